// The filtered backward of memfit.GradientFilter in one call: means over patches, the two products, and the way back.
//
// The same mathematics as patches.py and pooled_gradients.py, which are the reference. Each map is read or written once;
// what remains are products of small matrices. For maps of at most 4 axes on the CPU, float and double, taps summed.

#include <ATen/Parallel.h>
#include <torch/extension.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

namespace {

using at::Tensor;

// One spatial axis, cut into patches: the fields of patches.Cut.
struct Cut {
  int64_t size, width, patches, origin, every;
  // Pixels [begin, end) of a patch that belong to the map, counted in steps of `every`.
  int64_t begin(int64_t patch) const { return std::max<int64_t>(0, origin + patch * width); }
  int64_t end(int64_t patch) const {
    return std::min((size + every - 1) / every, origin + (patch + 1) * width);
  }
};

Cut cut_of(at::IntArrayRef numbers) {
  return {numbers[0], numbers[1], numbers[2], numbers[3], numbers[4]};
}

int64_t grain(int64_t numbers_per_item) {
  return std::max<int64_t>(1, at::internal::GRAIN_SIZE / std::max<int64_t>(1, numbers_per_item));
}

// The mean of each patch of x (B, C, H, W), as rows (B * patches, C); `last`: x has its channels last in memory.
template <typename T>
void pool_rows(const T* x, T* rows, int64_t batch, int64_t channels, const Cut& high, const Cut& wide, bool last) {
  const int64_t area = high.size * wide.size, patches = high.patches * wide.patches;
  if (last) {
    at::parallel_for(0, batch * patches, grain(area * channels / patches), [&](int64_t first, int64_t stop) {
      for (int64_t index = first; index < stop; ++index) {
        const int64_t b = index / patches, q = index % patches / wide.patches, r = index % wide.patches;
        T* out = rows + index * channels;
        std::fill(out, out + channels, T(0));
        const int64_t top = high.begin(q), bottom = high.end(q), left = wide.begin(r), right = wide.end(r);
        for (int64_t i = top; i < bottom; ++i) {
          for (int64_t j = left; j < right; ++j) {
            const T* pixel = x + ((b * high.size + i * high.every) * wide.size + j * wide.every) * channels;
            for (int64_t c = 0; c < channels; ++c) out[c] += pixel[c];
          }
        }
        const int64_t pixels = std::max<int64_t>(0, bottom - top) * std::max<int64_t>(0, right - left);
        const T scale = T(1) / T(std::max<int64_t>(1, pixels));
        for (int64_t c = 0; c < channels; ++c) out[c] *= scale;
      }
    });
    return;
  }
  at::parallel_for(0, batch * channels, grain(area), [&](int64_t first, int64_t stop) {
    std::vector<T> sums(wide.size);
    for (int64_t plane = first; plane < stop; ++plane) {
      const int64_t b = plane / channels, c = plane % channels;
      for (int64_t q = 0; q < high.patches; ++q) {
        std::fill(sums.begin(), sums.end(), T(0));
        const int64_t top = high.begin(q), bottom = high.end(q);
        for (int64_t i = top; i < bottom; ++i) {
          const T* row = x + (plane * high.size + i * high.every) * wide.size;
          for (int64_t j = 0; j < wide.size; ++j) sums[j] += row[j];
        }
        for (int64_t r = 0; r < wide.patches; ++r) {
          const int64_t left = wide.begin(r), right = wide.end(r);
          T total = 0;
          for (int64_t j = left; j < right; ++j) total += sums[j * wide.every];
          const int64_t pixels = std::max<int64_t>(0, bottom - top) * std::max<int64_t>(0, right - left);
          rows[((b * high.patches + q) * wide.patches + r) * channels + c] = total / T(std::max<int64_t>(1, pixels));
        }
      }
    }
  });
}

// A map (B, C, H, W) that has its patch's number at each pixel, from rows (B * patches, C), and 0 elsewhere.
template <typename T>
void spread_rows(const T* rows, T* map, int64_t batch, int64_t channels, const Cut& high, const Cut& wide, bool last) {
  const auto patch_of = [](const Cut& cut, int64_t pixel) -> int64_t {
    if (pixel % cut.every != 0) return -1;
    const int64_t inside = pixel / cut.every - cut.origin;
    return inside < 0 || inside >= cut.patches * cut.width ? -1 : inside / cut.width;
  };
  std::vector<int64_t> columns(wide.size);
  for (int64_t j = 0; j < wide.size; ++j) columns[j] = patch_of(wide, j);
  if (last) {
    at::parallel_for(0, batch * high.size, grain(wide.size * channels), [&](int64_t first, int64_t stop) {
      for (int64_t line = first; line < stop; ++line) {
        const int64_t b = line / high.size, q = patch_of(high, line % high.size);
        T* out = map + line * wide.size * channels;
        for (int64_t j = 0; j < wide.size; ++j, out += channels) {
          if (q < 0 || columns[j] < 0) {
            std::fill(out, out + channels, T(0));
          } else {
            const T* row = rows + ((b * high.patches + q) * wide.patches + columns[j]) * channels;
            std::copy(row, row + channels, out);
          }
        }
      }
    });
    return;
  }
  at::parallel_for(0, batch * channels, grain(high.size * wide.size), [&](int64_t first, int64_t stop) {
    for (int64_t plane = first; plane < stop; ++plane) {
      const int64_t b = plane / channels, c = plane % channels;
      const T* before = nullptr;  // the line above, where it has the same patches
      int64_t q_before = -2;
      for (int64_t i = 0; i < high.size; ++i) {
        const int64_t q = patch_of(high, i);
        T* out = map + (plane * high.size + i) * wide.size;
        if (q == q_before) {
          std::copy(before, before + wide.size, out);
        } else {
          for (int64_t j = 0; j < wide.size; ++j) {
            const bool outside = q < 0 || columns[j] < 0;
            out[j] = outside ? T(0) : rows[((b * high.patches + q) * wide.patches + columns[j]) * channels + c];
          }
        }
        before = out;
        q_before = q;
      }
    }
  });
}

bool has_channels_last(const Tensor& x) {
  return !x.is_contiguous() && x.is_contiguous(at::MemoryFormat::ChannelsLast);
}

Tensor rows_of(const Tensor& x, const Cut& high, const Cut& wide) {
  const bool last = has_channels_last(x);
  const Tensor dense = last ? x : x.contiguous();
  Tensor rows = at::empty({x.size(0) * high.patches * wide.patches, x.size(1)}, x.options());
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "memfit_pool", [&] {
    pool_rows(dense.const_data_ptr<scalar_t>(), rows.data_ptr<scalar_t>(), x.size(0), x.size(1), high, wide, last);
  });
  return rows;
}

// The kernel (O, I, h, w), summed over its taps: (O, I).
Tensor sum_of_taps(const Tensor& weight) {
  const int64_t outputs = weight.size(0), inputs = weight.size(1), taps = weight.size(2) * weight.size(3);
  if (taps == 1) return weight.reshape({outputs, inputs});
  if (weight.is_contiguous()) return at::mv(weight.view({-1, taps}), at::ones({taps}, weight.options())).view({outputs, inputs});
  return weight.permute({0, 2, 3, 1}).reshape({outputs, taps, inputs}).sum(1);
}

Tensor pool(const Tensor& x, at::IntArrayRef rows, at::IntArrayRef columns) {
  const Cut high = cut_of(rows), wide = cut_of(columns);
  return rows_of(x, high, wide).view({x.size(0), high.patches, wide.patches, x.size(1)}).permute({0, 3, 1, 2});
}

std::tuple<std::optional<Tensor>, std::optional<Tensor>, std::optional<Tensor>> backward(
    const Tensor& g, const std::optional<Tensor>& pooled, const Tensor& weight, at::IntArrayRef input_rows,
    at::IntArrayRef input_columns, at::IntArrayRef output_rows, at::IntArrayRef output_columns, int64_t groups,
    bool channels_last, double scale, std::vector<bool> wanted) {
  const Cut high = cut_of(input_rows), wide = cut_of(input_columns);
  const Cut g_high = cut_of(output_rows), g_wide = cut_of(output_columns);
  const int64_t batch = g.size(0), outputs = weight.size(0), inputs = weight.size(1) * groups;
  const int64_t patches = g_high.patches * g_wide.patches;
  const bool depthwise = groups == outputs && groups == inputs;
  Tensor means = rows_of(g, g_high, g_wide);
  std::optional<Tensor> dx, dweight, dbias;
  if (wanted[0]) {
    Tensor taps = sum_of_taps(weight), coarse;
    if (groups == 1) {
      coarse = at::mm(means, taps);
    } else if (depthwise) {
      coarse = means * taps.view({1, outputs});
    } else {
      const Tensor left = means.view({-1, groups, outputs / groups}).transpose(0, 1);
      coarse = at::bmm(left, taps.view({groups, outputs / groups, -1})).transpose(0, 1).reshape({-1, inputs}).contiguous();
    }
    if (scale != 1) coarse.mul_(scale);
    const auto format = channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
    dx = at::empty({batch, inputs, high.size, wide.size}, g.options().memory_format(format));
    AT_DISPATCH_FLOATING_TYPES(g.scalar_type(), "memfit_spread", [&] {
      spread_rows(
          coarse.const_data_ptr<scalar_t>(), dx->data_ptr<scalar_t>(), batch, inputs, high, wide, channels_last);
    });
  }
  if (wanted[1] || wanted[2]) {  // from means to sums: patches at the border may have fewer pixels
    AT_DISPATCH_FLOATING_TYPES(g.scalar_type(), "memfit_sums", [&] {
      scalar_t* row = means.data_ptr<scalar_t>();
      for (int64_t index = 0; index < batch * patches; ++index, row += outputs) {
        const int64_t q = index % patches / g_wide.patches, r = index % g_wide.patches;
        const scalar_t pixels = (g_high.end(q) - g_high.begin(q)) * (g_wide.end(r) - g_wide.begin(r));
        for (int64_t o = 0; o < outputs; ++o) row[o] *= pixels;
      }
    });
  }
  if (wanted[1]) {
    const Tensor x = pooled->permute({0, 2, 3, 1}).reshape({-1, inputs});
    Tensor product;
    if (groups == 1) {
      product = at::mm(means.t(), x);
    } else if (depthwise) {
      product = (means * x).sum(0);
    } else {
      const Tensor left = means.view({-1, groups, outputs / groups}).permute({1, 2, 0});
      product = at::bmm(left, x.view({-1, groups, inputs / groups}).transpose(0, 1));
    }
    dweight = product.reshape({outputs, weight.size(1), 1, 1}).expand_as(weight);
  }
  if (wanted[2]) dbias = means.sum(0);
  return {dx, dweight, dbias};
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.def("pool", &pool);
  module.def("backward", &backward);
}
