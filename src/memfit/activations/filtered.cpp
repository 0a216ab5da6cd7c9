// The filtered backward of memfit.GradientFilter in one call: means over patches, the two products, and the way back.
//
// The same mathematics as patches.py and pooled_gradients.py, which are the reference. Each map is read or written once;
// what remains are products of small matrices. For maps of at most 4 axes on the CPU, float and double, taps summed.

#include <ATen/Parallel.h>
#include <torch/extension.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

namespace {

using at::Tensor;

// One spatial axis, cut into patches: the fields of patches.Cut.
struct Cut {
  int64_t size, width, patches, origin, every;
  // Pixels [begin, end) of a patch that belong to the map, counted in steps of `every`.
  int64_t begin(int64_t patch) const { return std::max<int64_t>(0, origin + patch * width); }
  int64_t end(int64_t patch) const {
    return std::min(pixels(), origin + (patch + 1) * width);
  }
  int64_t pixels() const { return (size + every - 1) / every; }
  // Whether each pixel of the axis is in a patch.
  bool is_covered() const { return origin <= 0 && origin + patches * width >= size && every == 1; }
  // Whether moreover each patch is full.
  bool is_even() const { return origin == 0 && patches * width == size && every == 1; }
  // The patch that a pixel of the axis is in, or -1.
  int64_t patch_of(int64_t pixel) const {
    if (pixel % every != 0) return -1;
    const int64_t inside = pixel / every - origin;
    return inside < 0 || inside >= patches * width ? -1 : inside / width;
  }
};

Cut cut_of(at::IntArrayRef numbers) {
  return {numbers[0], numbers[1], numbers[2], numbers[3], numbers[4]};
}

// How many pixels are in a patch; 1 where there are none.
int64_t pixels_of(int64_t top, int64_t bottom, int64_t left, int64_t right) {
  return std::max<int64_t>(1, std::max<int64_t>(0, bottom - top) * std::max<int64_t>(0, right - left));
}

int64_t grain(int64_t numbers_per_item) {
  return std::max<int64_t>(1, at::internal::GRAIN_SIZE / std::max<int64_t>(1, numbers_per_item));
}

constexpr int64_t LANES = 32;  // channels whose sums stay in registers
constexpr int64_t FEW = 16;    // channels fewer than which fill no register

// Calls f(c, count) for blocks of channels; the count of whole ones is known to the compiler, which unrolls their loops.
template <typename F>
inline void for_blocks(int64_t channels, const F& f) {
  int64_t c = 0;
  for (; c + LANES <= channels; c += LANES) f(c, std::integral_constant<int64_t, LANES>());
  for (; c + LANES / 4 <= channels; c += LANES / 4) f(c, std::integral_constant<int64_t, LANES / 4>());
  if (c < channels) f(c, channels - c);
}

// The sums over pixels [top, bottom) x [left, right) of a map of channels-last lines, for `count` channels.
template <typename T, typename Count>
inline void add_up(
    const T* __restrict__ map, int64_t line, int64_t pixel, int64_t top, int64_t bottom, int64_t left, int64_t right,
    Count count, T* __restrict__ sums) {
  for (int64_t k = 0; k < count; ++k) sums[k] = 0;
  if (left >= right) return;
  for (int64_t i = top; i < bottom; ++i) {
    const T* __restrict__ from = map + i * line + left * pixel;
    for (int64_t j = left; j < right; ++j, from += pixel) {
      for (int64_t k = 0; k < count; ++k) sums[k] += from[k];
    }
  }
}

// The same for maps of few channels, with the channels last: whole lines are added first.
template <typename T>
void pool_few(const T* x, T* rows, int64_t batch, int64_t channels, const Cut& high, const Cut& wide) {
  const int64_t numbers = wide.size * channels;
  at::parallel_for(0, batch * high.patches, grain(high.width * numbers), [&](int64_t first, int64_t stop) {
    std::vector<T> sums(numbers);
    for (int64_t index = first; index < stop; ++index) {
      const int64_t b = index / high.patches, q = index % high.patches;
      const int64_t top = high.begin(q), bottom = high.end(q);
      std::fill(sums.begin(), sums.end(), T(0));
      for (int64_t i = top; i < bottom; ++i) {
        const T* __restrict__ line = x + (b * high.size + i * high.every) * numbers;
        T* __restrict__ into = sums.data();
        for (int64_t k = 0; k < numbers; ++k) into[k] += line[k];
      }
      for (int64_t r = 0; r < wide.patches; ++r) {
        const int64_t left = wide.begin(r), right = wide.end(r);
        T* out = rows + (index * wide.patches + r) * channels;
        std::fill(out, out + channels, T(0));
        for (int64_t j = left; j < right; ++j) {
          for (int64_t c = 0; c < channels; ++c) out[c] += sums[j * wide.every * channels + c];
        }
        const T scale = T(1) / T(pixels_of(top, bottom, left, right));
        for (int64_t c = 0; c < channels; ++c) out[c] *= scale;
      }
    }
  });
}

// The mean of each patch of x (B, C, H, W), as rows (B * patches, C); `last`: x has its channels last in memory.
template <typename T>
void pool_rows(const T* x, T* rows, int64_t batch, int64_t channels, const Cut& high, const Cut& wide, bool last) {
  const int64_t area = high.size * wide.size, patches = high.patches * wide.patches;
  if (last && channels < FEW) return pool_few(x, rows, batch, channels, high, wide);
  if (last) {
    const int64_t line = high.every * wide.size * channels, pixel = wide.every * channels;
    at::parallel_for(0, batch * patches, grain(area * channels / patches), [&](int64_t first, int64_t stop) {
      for (int64_t index = first; index < stop; ++index) {
        const int64_t q = index % patches / wide.patches, r = index % wide.patches;
        const int64_t top = high.begin(q), bottom = high.end(q), left = wide.begin(r), right = wide.end(r);
        const T scale = T(1) / T(pixels_of(top, bottom, left, right));
        const T* map = x + index / patches * area * channels;
        T* __restrict__ out = rows + index * channels;
        for_blocks(channels, [&](int64_t c, auto count) {
          T sums[LANES];
          add_up(map + c, line, pixel, top, bottom, left, right, count, sums);
          for (int64_t k = 0; k < count; ++k) out[c + k] = sums[k] * scale;
        });
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
          rows[((b * high.patches + q) * wide.patches + r) * channels + c] = total / T(pixels_of(top, bottom, left, right));
        }
      }
    }
  });
}

// A map (B, C, H, W) that has its patch's number at each pixel, from rows (B * patches, C), and 0 elsewhere.
template <typename T>
void spread_rows(const T* rows, T* map, int64_t batch, int64_t channels, const Cut& high, const Cut& wide, bool last) {
  std::vector<int64_t> columns(wide.size);
  for (int64_t j = 0; j < wide.size; ++j) columns[j] = wide.patch_of(j);
  if (last) {
    const int64_t numbers = wide.size * channels;
    at::parallel_for(0, batch * high.size, grain(numbers), [&](int64_t first, int64_t stop) {
      int64_t before = -1;  // the patches that the line above has
      for (int64_t line = first; line < stop; ++line) {
        const int64_t b = line / high.size, q = high.patch_of(line % high.size), now = b * high.patches + q;
        T* __restrict__ out = map + line * numbers;
        if (q >= 0 && now == before) {
          std::copy(out - numbers, out, out);
          continue;
        }
        before = q >= 0 ? now : -1;
        for (int64_t j = 0; j < wide.size; ++j, out += channels) {
          if (q < 0 || columns[j] < 0) {
            std::fill(out, out + channels, T(0));
          } else {
            const T* __restrict__ row = rows + (now * wide.patches + columns[j]) * channels;
            for_blocks(channels, [&](int64_t c, auto count) {
              for (int64_t k = 0; k < count; ++k) out[c + k] = row[c + k];
            });
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
        const int64_t q = high.patch_of(i);
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
  if (!has_channels_last(weight)) {
    return at::mv(weight.contiguous().view({-1, taps}), at::ones({taps}, weight.options())).view({outputs, inputs});
  }
  Tensor total = at::empty({outputs, inputs}, weight.options());
  AT_DISPATCH_FLOATING_TYPES(weight.scalar_type(), "memfit_sum_of_taps", [&] {
    const scalar_t* from = weight.const_data_ptr<scalar_t>();
    scalar_t* into = total.data_ptr<scalar_t>();
    at::parallel_for(0, outputs, grain(taps * inputs), [&](int64_t first, int64_t stop) {
      for (int64_t o = first; o < stop; ++o) {
        scalar_t* __restrict__ out = into + o * inputs;
        std::copy(from + o * taps * inputs, from + (o * taps + 1) * inputs, out);
        for (int64_t t = 1; t < taps; ++t) {
          const scalar_t* __restrict__ row = from + (o * taps + t) * inputs;
          for (int64_t i = 0; i < inputs; ++i) out[i] += row[i];
        }
      }
    });
  });
  return total;
}

// A gradient (O, I) at all taps of a kernel like `weight`, in its memory format, as autograd would copy it otherwise.
Tensor at_all_taps(const Tensor& gradient, const Tensor& weight) {
  const int64_t outputs = weight.size(0), inputs = weight.size(1), taps = weight.size(2) * weight.size(3);
  if (taps == 1) return gradient.view({outputs, inputs, 1, 1});
  if (!has_channels_last(weight)) {
    return at::mm(gradient.view({-1, 1}), at::ones({1, taps}, weight.options())).view(weight.sizes());
  }
  Tensor whole = at::empty_like(weight);
  AT_DISPATCH_FLOATING_TYPES(weight.scalar_type(), "memfit_at_all_taps", [&] {
    const scalar_t* from = gradient.const_data_ptr<scalar_t>();
    scalar_t* into = whole.data_ptr<scalar_t>();
    at::parallel_for(0, outputs, grain(taps * inputs), [&](int64_t first, int64_t stop) {
      for (int64_t o = first; o < stop; ++o) {
        for (int64_t t = 0; t < taps; ++t) {
          std::copy(from + o * inputs, from + (o + 1) * inputs, into + (o * taps + t) * inputs);
        }
      }
    });
  });
  return whole;
}

// A depthwise layer with the channels last, in one pass: g (B, Q.size, R.size, C) is read once, and dx written once.
// `dx` may be null; so may `product`, to which the sum over patches of pixels, mean of g and mean of x is added.
template <typename T>
void depthwise_last(
    const T* g, const T* pooled, const T* taps, T* dx, T* product, int64_t batch, int64_t channels, const Cut& high,
    const Cut& wide, const Cut& g_high, const Cut& g_wide, T scale) {
  const int64_t patches = g_high.patches * g_wide.patches;
  const int64_t line = g_wide.size * channels, x_line = high.every * wide.size * channels, x_pixel = wide.every * channels;
  const int64_t threads = at::get_num_threads(), apart = channels + 32;  // no line of a cache is for two threads
  std::vector<T> products(product == nullptr ? 0 : threads * apart, T(0));
  at::parallel_for(0, batch * patches, grain(g_high.width * g_wide.width * channels), [&](int64_t first, int64_t stop) {
    T* __restrict__ mine = product == nullptr ? nullptr : products.data() + at::get_thread_num() * apart;
    for (int64_t index = first; index < stop; ++index) {
      const int64_t b = index / patches, q = index % patches / g_wide.patches, r = index % g_wide.patches;
      const int64_t g_top = g_high.begin(q), g_bottom = g_high.end(q), g_left = g_wide.begin(r), g_right = g_wide.end(r);
      const T factor = scale / T(pixels_of(g_top, g_bottom, g_left, g_right));
      const T* map = g + b * g_high.size * line;
      for_blocks(channels, [&](int64_t c, auto count) {
        T sums[LANES];
        add_up(map + c, line, channels, g_top, g_bottom, g_left, g_right, count, sums);
        if (mine != nullptr) {
          const T* __restrict__ x = pooled + index * channels + c;
          for (int64_t k = 0; k < count; ++k) mine[c + k] += sums[k] * x[k];
        }
        if (dx == nullptr) return;
        for (int64_t k = 0; k < count; ++k) sums[k] *= taps[c + k] * factor;
        T* into = dx + b * high.size * wide.size * channels + c;
        for (int64_t i = high.begin(q); i < high.end(q); ++i) {
          for (int64_t j = wide.begin(r); j < wide.end(r); ++j) {
            T* __restrict__ out = into + i * x_line + j * x_pixel;
            for (int64_t k = 0; k < count; ++k) out[k] = sums[k];
          }
        }
      });
    }
  });
  for (int64_t thread = 0; product != nullptr && thread < threads; ++thread) {
    for (int64_t c = 0; c < channels; ++c) product[c] += products[thread * apart + c];
  }
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
  const auto format = channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
  std::optional<Tensor> dx, dweight, dbias;
  if (wanted[0]) dx = at::empty({batch, inputs, high.size, wide.size}, g.options().memory_format(format));
  if (depthwise && channels_last && has_channels_last(g) && !wanted[2]) {
    const Tensor taps = wanted[0] ? sum_of_taps(weight) : Tensor();
    const Tensor rows = wanted[1] ? pooled->permute({0, 2, 3, 1}).contiguous() : Tensor();
    const Tensor product = wanted[1] ? at::zeros({outputs}, g.options()) : Tensor();
    if (wanted[0] && !(high.is_covered() && wide.is_covered())) dx->zero_();
    AT_DISPATCH_FLOATING_TYPES(g.scalar_type(), "memfit_depthwise", [&] {
      depthwise_last<scalar_t>(
          g.const_data_ptr<scalar_t>(), wanted[1] ? rows.const_data_ptr<scalar_t>() : nullptr,
          wanted[0] ? taps.const_data_ptr<scalar_t>() : nullptr, wanted[0] ? dx->data_ptr<scalar_t>() : nullptr,
          wanted[1] ? product.data_ptr<scalar_t>() : nullptr, batch, inputs, high, wide, g_high, g_wide, scale);
    });
    if (wanted[1]) dweight = at_all_taps(product.view({outputs, 1}), weight);
    return {dx, dweight, dbias};
  }
  Tensor means = rows_of(g, g_high, g_wide);
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
    AT_DISPATCH_FLOATING_TYPES(g.scalar_type(), "memfit_spread", [&] {
      spread_rows(
          coarse.const_data_ptr<scalar_t>(), dx->data_ptr<scalar_t>(), batch, inputs, high, wide, channels_last);
    });
  }
  // From means to sums: patches at the border may have fewer pixels.
  const bool even = g_high.is_even() && g_wide.is_even();
  const double pixels = even ? double(g_high.width * g_wide.width) : 1.0;
  if ((wanted[1] || wanted[2]) && !even) {
    AT_DISPATCH_FLOATING_TYPES(g.scalar_type(), "memfit_sums", [&] {
      scalar_t* rows = means.data_ptr<scalar_t>();
      at::parallel_for(0, batch * patches, grain(outputs), [&](int64_t first, int64_t stop) {
        for (int64_t index = first; index < stop; ++index) {
          const int64_t q = index % patches / g_wide.patches, r = index % g_wide.patches;
          const scalar_t count = (g_high.end(q) - g_high.begin(q)) * (g_wide.end(r) - g_wide.begin(r));
          for (int64_t o = 0; o < outputs; ++o) rows[index * outputs + o] *= count;
        }
      });
    });
  }
  if (wanted[1]) {
    const Tensor x = pooled->permute({0, 2, 3, 1}).reshape({-1, inputs});
    Tensor product;
    if (groups == 1) {
      product = inputs < FEW ? at::mm(x.t(), means).t().contiguous() : at::mm(means.t(), x);  // BLAS likes a wide result
    } else if (depthwise) {
      product = (means * x).sum(0);
    } else {
      const Tensor left = means.view({-1, groups, outputs / groups}).permute({1, 2, 0});
      product = at::bmm(left, x.view({-1, groups, inputs / groups}).transpose(0, 1));
    }
    if (pixels != 1) product.mul_(pixels);
    dweight = at_all_taps(product.reshape({outputs, weight.size(1)}), weight);
  }
  if (wanted[2]) dbias = means.sum(0).mul_(pixels);
  return {dx, dweight, dbias};
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.def("pool", &pool);
  module.def("backward", &backward);
}
