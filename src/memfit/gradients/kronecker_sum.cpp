// One addition to a small KroneckerSum in one call: what is kept and what is new, as few terms as the rank has.
//
// The mathematics of kronecker_sum.py, reduction.py and mixing.py, which are the reference, with one difference: the
// singular values of a product L^T R of q terms, which are rows here, come from the q x q products of the terms with
// each other, in double. With R R^T = V D V^T, the values of L^T R are the roots of the eigenvalues of
//
//     C = D^1/2 V^T (L L^T) V D^1/2 = W S^2 W^T,
//
// its left vectors are L^T (V D^1/2 W S^-1), its right ones R^T (V D^-1/2 W). Factors and terms are of float32, or the
// factors of 16 bits.

#include <torch/extension.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <optional>
#include <vector>

namespace {

using at::Tensor;

constexpr double NEGLIGIBLE = 1e-6;  // as in mixing.py: singular values below this share of the largest
constexpr double ROUNDING = 1e-15;   // of products in double: eigenvalues below this share of the largest
constexpr float LARGEST = 32767;     // of 16 bits with a sign

template <typename T>
struct Matrix {
  int64_t rows, columns;
  std::vector<T> numbers;
  Matrix(int64_t rows, int64_t columns) : rows(rows), columns(columns), numbers(rows * columns, T(0)) {}
  T* operator[](int64_t row) { return numbers.data() + row * columns; }
  const T* operator[](int64_t row) const { return numbers.data() + row * columns; }
};
using Doubles = Matrix<double>;
using Floats = Matrix<float>;

template <typename T>
double dot(const T* __restrict__ a, const T* __restrict__ b, int64_t count) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) sum += double(a[i]) * double(b[i]);
  return sum;
}

template <typename T, typename U>
void add_multiple(T* __restrict__ to, U factor, const T* __restrict__ row, int64_t count) {
  const T by = T(factor);
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) to[i] += by * row[i];
}

// The products of all pairs of rows.
Doubles products(const Floats& rows) {
  Doubles found(rows.rows, rows.rows);
  for (int64_t i = 0; i < rows.rows; ++i)
    for (int64_t j = 0; j <= i; ++j) found[i][j] = found[j][i] = dot(rows[i], rows[j], rows.columns);
  return found;
}

// a b^T.
Doubles times_transposed(const Doubles& a, const Doubles& b) {
  Doubles found(a.rows, b.rows);
  for (int64_t i = 0; i < a.rows; ++i)
    for (int64_t j = 0; j < b.rows; ++j) found[i][j] = dot(a[i], b[j], a.columns);
  return found;
}

// a b, of the kind of b.
template <typename T>
Matrix<T> times(const Doubles& a, const Matrix<T>& b) {
  Matrix<T> found(a.rows, b.columns);
  for (int64_t i = 0; i < a.rows; ++i)
    for (int64_t k = 0; k < b.rows; ++k) add_multiple(found[i], a[i][k], b[k], b.columns);
  return found;
}

// a^T b.
Floats transposed_times(const Floats& a, const Floats& b) {
  Floats found(a.columns, b.columns);
  for (int64_t k = 0; k < a.rows; ++k)
    for (int64_t i = 0; i < a.columns; ++i) add_multiple(found[i], a[k][i], b[k], b.columns);
  return found;
}

struct Eigen {
  std::vector<double> values;  // largest first
  Doubles vectors;             // one a row
};

// Of a symmetric matrix without negative eigenvalues, by cyclic Jacobi rotations (Golub and Van Loan, Matrix
// Computations, 8.5): each makes one pair of elements zero, and the others smaller in sum.
Eigen eigen(Doubles a) {
  const int64_t size = a.rows;
  Doubles vectors(size, size);
  double largest = 0;
  for (int64_t i = 0; i < size; ++i) {
    vectors[i][i] = 1;
    largest = std::max(largest, a[i][i]);
  }
  bool rotated = true;
  for (int sweep = 0; rotated && sweep < 50; ++sweep) {
    rotated = false;
    for (int64_t p = 0; p < size; ++p) {
      for (int64_t q = p + 1; q < size; ++q) {
        const double between = a[p][q];
        if (!(std::abs(between) > 1e-2 * ROUNDING * largest)) continue;
        rotated = true;
        const double ratio = (a[q][q] - a[p][p]) / (2 * between);
        const double tangent = std::copysign(1 / (std::abs(ratio) + std::sqrt(ratio * ratio + 1)), ratio);
        const double cosine = 1 / std::sqrt(tangent * tangent + 1), sine = tangent * cosine;
        const double first = a[p][p] - tangent * between, second = a[q][q] + tangent * between;
        for (auto* rows : {&a, &vectors}) {
          double *__restrict__ x = (*rows)[p], *__restrict__ y = (*rows)[q];
#pragma omp simd
          for (int64_t k = 0; k < size; ++k) {
            const double old = x[k];
            x[k] = cosine * old - sine * y[k];
            y[k] = sine * old + cosine * y[k];
          }
        }
        a[p][p] = first;
        a[q][q] = second;
        a[p][q] = a[q][p] = 0;
        for (int64_t k = 0; k < size; ++k) {
          if (k == p || k == q) continue;
          a[k][p] = a[p][k];
          a[k][q] = a[q][k];
        }
      }
    }
  }
  std::vector<int64_t> order(size);
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(), [&](int64_t i, int64_t j) { return a[i][i] > a[j][j]; });
  Eigen found{{}, Doubles(size, size)};
  for (int64_t i = 0; i < size; ++i) {
    found.values.push_back(std::max(a[order[i]][order[i]], 0.0));
    std::copy(vectors[order[i]], vectors[order[i]] + size, found.vectors[i]);
  }
  return found;
}

// mixing.scrambled.
uint64_t scrambled(uint64_t number) {
  uint64_t bits = number + 0x9E3779B97F4A7C15u;
  bits = (bits ^ bits >> 30) * 0xBF58476D1CE4E5B9u;
  bits = (bits ^ bits >> 27) * 0x94D049BB133111EBu;
  return bits ^ bits >> 31;
}

// How singular values are made fewer.
struct Mixing {
  int64_t rank;
  std::optional<uint64_t> start;  // of the random signs; none where the sum is biased

  // mixing.random_signs.
  double sign(int64_t number) const {
    return 1 - 2 * double(scrambled(*start + number / 64 * 64) >> number % 64 & 1);
  }

  // M, transposed: (rank x p), of p values above what is negligible; mixing.biased_mixing and unbiased_mixing.
  Doubles of(const std::vector<double>& values) const {
    const int64_t count = values.size();
    Doubles mixed(rank, count);
    const bool all = !start || count <= rank;
    const int64_t first = all ? std::min(count, rank) : kept(values);
    for (int64_t i = 0; i < first; ++i) mixed[i][i] = std::sqrt(values[i]);
    if (!all) mix(values, first, mixed);
    return mixed;
  }

 private:
  // mixing.kept.
  int64_t kept(const std::vector<double>& values) const {
    double total = std::accumulate(values.begin(), values.end(), 0.0);
    for (int64_t i = 0; i < rank - 1; ++i) {
      if ((rank - i) * values[i] <= total) return i;
      total -= values[i];
    }
    return rank - 1;
  }

  // The values from `first` on in the columns from `first` on, by the rotations of mixing.orthonormal_columns.
  void mix(const std::vector<double>& values, int64_t first, Doubles& mixed) const {
    const int64_t columns = rank - first;
    const double total = std::accumulate(values.begin() + first, values.end(), 0.0);
    const double size = std::sqrt(total / columns);
    std::vector<double> rest(columns, 0.0);  // the direction of what is left
    rest[0] = 1;
    double length = 1, square = 1;
    int64_t used = 1;
    for (int64_t i = first; i < int64_t(values.size()); ++i) {
      const double wanted = values[i] * columns / total, signed_size = size * sign(i);
      if (square < std::min(wanted, 1.0) && used < columns) {
        const double share = std::min((wanted - square) / (1 - square), 1.0);
        const double sine = std::sqrt(share), cosine = std::sqrt(1 - share);
        for (int64_t k = 0; k < columns; ++k) {
          const double from = length * rest[k];
          mixed[first + k][i] = signed_size * (k == used ? sine : cosine * from);
          rest[k] = k == used ? cosine : -sine * from;
        }
        length = 1;
        square = std::max(square + 1 - wanted, 0.0);
        ++used;
      } else {
        const double share = square > 0 ? std::min(wanted / square, 1.0) : 0.0;
        for (int64_t k = 0; k < columns; ++k)
          mixed[first + k][i] = signed_size * std::sqrt(share) * length * rest[k];
        length *= std::sqrt(1 - share);
        square = std::max(square - wanted, 0.0);
      }
    }
  }
};

// Singular values of their squares, but those below a share of the largest.
std::vector<double> roots(const std::vector<double>& squares, double share) {
  std::vector<double> found;
  for (const double square : squares) {
    if (!(std::sqrt(square) > share * std::sqrt(squares[0]))) break;
    found.push_back(std::sqrt(square));
  }
  return found;
}

bool overflows(const std::vector<double>& values) {
  return !values.empty() && values[0] > std::numeric_limits<float>::max();
}

void divide_columns(Doubles& matrix, const std::vector<double>& by) {
  for (int64_t i = 0; i < matrix.rows; ++i)
    for (int64_t j = 0; j < matrix.columns; ++j) matrix[i][j] /= by[j];
}

// The first rows.
Doubles head(const Doubles& matrix, int64_t rows) {
  Doubles found(rows, matrix.columns);
  std::copy(matrix[0], matrix[rows], found[0]);
  return found;
}

bool is_finite(const Doubles& matrix) {
  return std::isfinite(std::accumulate(matrix.numbers.begin(), matrix.numbers.end(), 0.0));
}

struct Factors {
  Floats left, right;
};

// reduction.reduce_matrix of one that is not longer than wide.
std::optional<Factors> reduce_wide(const Floats& matrix, const Mixing& mixing) {
  const Doubles squares = products(matrix);
  if (!is_finite(squares)) return std::nullopt;
  const Eigen found = eigen(squares);
  const std::vector<double> values = roots(found.values, NEGLIGIBLE);
  if (overflows(values)) return std::nullopt;
  const Doubles basis = head(found.vectors, values.size());
  Doubles mixed = mixing.of(values);
  const Doubles left = times(mixed, basis);
  divide_columns(mixed, values);
  Floats rounded(left.rows, left.columns);
  std::copy(left.numbers.begin(), left.numbers.end(), rounded.numbers.begin());
  return Factors{std::move(rounded), times(times(mixed, basis), matrix)};
}

std::optional<Factors> reduce_matrix(const Floats& matrix, const Mixing& mixing) {
  if (matrix.rows <= matrix.columns) return reduce_wide(matrix, mixing);
  Floats turned(matrix.columns, matrix.rows);
  for (int64_t i = 0; i < matrix.rows; ++i)
    for (int64_t j = 0; j < matrix.columns; ++j) turned[j][i] = matrix[i][j];
  auto found = reduce_wide(turned, mixing);
  if (found) std::swap(found->left, found->right);
  return found;
}

// reduction.reduce_product of (q x n) and (q x m).
std::optional<Factors> reduce_product(const Floats& left, const Floats& right, const Mixing& mixing) {
  const int64_t count = left.rows;
  if (std::min(left.columns, right.columns) <= count) return reduce_matrix(transposed_times(left, right), mixing);
  Doubles of_left = products(left), of_right = products(right);
  if (!is_finite(of_left) || !is_finite(of_right)) return std::nullopt;
  // Both sides of a term are made equally long, so that what is small on one side only is not lost; a term of which one
  // side is zero has no part in anything.
  std::vector<double> longer(count, 0.0), shorter(count, 0.0);
  for (int64_t i = 0; i < count; ++i) {
    if (!(of_left[i][i] > 0 && of_right[i][i] > 0)) continue;
    longer[i] = std::pow(of_right[i][i] / of_left[i][i], 0.25);
    shorter[i] = 1 / longer[i];
  }
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t j = 0; j < count; ++j) {
      of_left[i][j] *= longer[i] * longer[j];
      of_right[i][j] *= shorter[i] * shorter[j];
    }
  }
  const Eigen right_side = eigen(of_right);
  Doubles towards_left = right_side.vectors, towards_right = right_side.vectors;  // (V D^1/2)^T and (V D^-1/2)^T
  for (int64_t i = 0; i < count; ++i) {
    const bool lost = !(right_side.values[i] > ROUNDING * right_side.values[0]);
    const double root = std::sqrt(right_side.values[i]);
    for (int64_t j = 0; j < count; ++j) {
      towards_left[i][j] *= lost ? 0 : root;
      towards_right[i][j] = lost ? 0 : towards_right[i][j] / root;
    }
  }
  const Eigen core = eigen(times_transposed(times(towards_left, of_left), towards_left));
  const std::vector<double> values = roots(core.values, mixing.start ? NEGLIGIBLE : std::sqrt(ROUNDING));
  if (overflows(values)) return std::nullopt;
  const Doubles basis = head(core.vectors, values.size());
  Doubles mixed = mixing.of(values);
  Doubles of_rights = times(times(mixed, basis), towards_right);
  divide_columns(mixed, values);
  Doubles of_lefts = times(times(mixed, basis), towards_left);
  for (int64_t i = 0; i < of_lefts.rows; ++i) {
    for (int64_t j = 0; j < count; ++j) {
      of_lefts[i][j] *= longer[j];
      of_rights[i][j] *= shorter[j];
    }
  }
  return Factors{times(of_lefts, left), times(of_rights, right)};
}

// A KroneckerSum's buffers: factors as rows, of float32, or of 16 bits with a scale each.
struct Kept {
  Tensor left, right;
  std::optional<Tensor> scales;

  // The rows of a factor, and space for more.
  Floats rows(int64_t side, int64_t more) const {
    const Tensor& factor = side ? right : left;
    Floats found(factor.size(0) + more, factor.size(1));
    if (scales) {
      const float scale = scales->const_data_ptr<float>()[side];
      const int16_t* from = factor.const_data_ptr<int16_t>();
      std::transform(from, from + factor.numel(), found[0], [scale](int16_t number) { return number * scale; });
    } else {
      std::copy_n(factor.const_data_ptr<float>(), factor.numel(), found[0]);
    }
    return found;
  }

  void keep(int64_t side, const Floats& rows) const {
    const Tensor& factor = side ? right : left;
    if (!scales) {
      std::copy(rows.numbers.begin(), rows.numbers.end(), factor.data_ptr<float>());
      return;
    }
    float largest = LARGEST * std::numeric_limits<float>::min();
    for (const float number : rows.numbers) largest = std::max(largest, std::abs(number));
    const float by = LARGEST / largest;
    int16_t* to = factor.data_ptr<int16_t>();
    for (size_t i = 0; i < rows.numbers.size(); ++i) to[i] = int16_t(std::nearbyint(rows.numbers[i] * by));
    scales->data_ptr<float>()[side] = largest / LARGEST;
  }
};

void fill(float* to, const Tensor& from) {
  const Tensor contiguous = from.contiguous();
  std::copy_n(contiguous.const_data_ptr<float>(), contiguous.numel(), to);
}

bool finish(const Kept& kept, const std::optional<Factors>& factors) {
  if (!factors) return false;
  for (const Floats* each : {&factors->left, &factors->right})
    if (!std::isfinite(std::accumulate(each->numbers.begin(), each->numbers.end(), 0.0))) return false;
  kept.keep(0, factors->left);
  kept.keep(1, factors->right);
  return true;
}

// Add left^T right, of (b x n) and (b x m); whether the numbers are finite, and so were added.
bool add_rows(
    const Tensor& kept_left, const Tensor& kept_right, const std::optional<Tensor>& scales, const Tensor& left,
    const Tensor& right, std::optional<uint64_t> start) {
  const Kept kept{kept_left, kept_right, scales};
  const int64_t rank = kept_left.size(0);
  Floats lefts = kept.rows(0, left.size(0)), rights = kept.rows(1, right.size(0));
  fill(lefts[rank], left);
  fill(rights[rank], right);
  return finish(kept, reduce_product(lefts, rights, Mixing{rank, start}));
}

// Add a whole matrix (n x m); the same otherwise.
bool add_matrix(
    const Tensor& kept_left, const Tensor& kept_right, const std::optional<Tensor>& scales, const Tensor& matrix,
    std::optional<uint64_t> start) {
  const Kept kept{kept_left, kept_right, scales};
  Floats sum = transposed_times(kept.rows(0, 0), kept.rows(1, 0));
  const Tensor more = matrix.contiguous();
  add_multiple(sum[0], 1, more.const_data_ptr<float>(), more.numel());
  return finish(kept, reduce_matrix(sum, Mixing{kept_left.size(0), start}));
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.def("add_rows", &add_rows);
  module.def("add_matrix", &add_matrix);
}
