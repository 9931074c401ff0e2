// In-place mixed-radix FFT over vectors: every lane is an independent transform, so there is not one shuffle.
// Forward is decimation in frequency and leaves the result in digit-reversed order; inverse is decimation in
// time and takes that order. An element is [re lanes][im lanes]. Swapping the two offsets turns a forward
// butterfly into an inverse one, so each radix is written once.
#pragma once

namespace lkconv::cpu::LKCONV_ISA {

// cos and sin of 2 pi a / n at compile time (Taylor series after reduction to the first octant).
constexpr double kTwoPi = 6.283185307179586476925286766559;
constexpr double taylor(double x, bool sine) {
  double term = sine ? x : 1, sum = term;
  for (int i = 1; i < 16; ++i) {
    const int k = 2 * i + (sine ? 1 : 0);
    term *= -x * x / (k * (k - 1));
    sum += term;
  }
  return sum;
}
constexpr double unit_cos(int a, int n) {
  a %= n;
  if (2 * a > n) a = n - a;                           // cos(-t) = cos(t)
  if (4 * a > n) return -unit_cos(n - 2 * a, 2 * n);  // cos(pi - t) = -cos(t)
  return 8 * a > n ? taylor(kTwoPi * (n - 4 * a) / (4.0 * n), true) : taylor(kTwoPi * a / n, false);
}
constexpr double unit_sin(int a, int n) { return unit_cos(4 * a - n + 4 * n, 4 * n); }

// y = DFT(x) with kernel exp(-2 pi i jk/R), in registers.
template <int R>
struct Dft;

template <int R>
LKCONV_INLINE void dft(VF* re, VF* im) {
  Dft<R>::run(re, im);
}

template <>
struct Dft<1> {
  static LKCONV_INLINE void run(VF*, VF*) {}
};
template <>
struct Dft<2> {
  static LKCONV_INLINE void run(VF* re, VF* im) {
    VF a = re[0] - re[1], b = im[0] - im[1];
    re[0] += re[1];
    im[0] += im[1];
    re[1] = a;
    im[1] = b;
  }
};
template <>
struct Dft<4> {
  static LKCONV_INLINE void run(VF* re, VF* im) {
    VF a = re[0] + re[2], b = re[0] - re[2], c = re[1] + re[3], d = re[1] - re[3];
    VF e = im[0] + im[2], f = im[0] - im[2], g = im[1] + im[3], h = im[1] - im[3];
    re[0] = a + c;
    im[0] = e + g;
    re[2] = a - c;
    im[2] = e - g;
    re[1] = b + h;
    im[1] = f - d;
    re[3] = b - h;
    im[3] = f + d;
  }
};
// Odd primes: with s_k = x_k + x_{R-k} and d_k = x_k - x_{R-k},
// y_j = x_0 + sum_k s_k cos(2 pi jk/R) - i sum_k d_k sin(2 pi jk/R), and y_{R-j} has the other sign.
template <int R>
struct DftOdd {
  static LKCONV_INLINE void run(VF* re, VF* im) {
    constexpr int H = R / 2;
    VF sr[H], si[H], dr[H], di[H], yr[R], yi[R];
    yr[0] = re[0];
    yi[0] = im[0];
#pragma GCC unroll 4
    for (int k = 0; k < H; ++k) {
      sr[k] = re[k + 1] + re[R - 1 - k];
      si[k] = im[k + 1] + im[R - 1 - k];
      dr[k] = re[k + 1] - re[R - 1 - k];
      di[k] = im[k + 1] - im[R - 1 - k];
      yr[0] += sr[k];
      yi[0] += si[k];
    }
#pragma GCC unroll 4
    for (int j = 1; j <= H; ++j) {
      VF a = re[0], b = im[0], c{}, d{};
#pragma GCC unroll 4
      for (int k = 0; k < H; ++k) {
        const float cs = float(unit_cos(j * (k + 1), R)), sn = float(unit_sin(j * (k + 1), R));
        a += sr[k] * cs;
        b += si[k] * cs;
        c += di[k] * sn;
        d += dr[k] * sn;
      }
      yr[j] = a + c;
      yi[j] = b - d;
      yr[R - j] = a - c;
      yi[R - j] = b + d;
    }
#pragma GCC unroll 8
    for (int j = 0; j < R; ++j) re[j] = yr[j], im[j] = yi[j];
  }
};
template <>
struct Dft<3> : DftOdd<3> {};
template <>
struct Dft<5> : DftOdd<5> {};
template <>
struct Dft<7> : DftOdd<7> {};

// R = A * B in registers: B transforms of length A, twiddles, A transforms of length B.
template <int A, int B>
struct DftProduct {
  static LKCONV_INLINE void run(VF* re, VF* im) {
    VF tr[A * B], ti[A * B];
#pragma GCC unroll 8
    for (int b = 0; b < B; ++b) {
      VF r[A], i[A];
#pragma GCC unroll 8
      for (int a = 0; a < A; ++a) r[a] = re[b + B * a], i[a] = im[b + B * a];
      dft<A>(r, i);
#pragma GCC unroll 8
      for (int k = 0; k < A; ++k) {
        const float c = float(unit_cos(b * k, A * B)), s = float(unit_sin(b * k, A * B));
        if (b * k == 0) {
          tr[b * A + k] = r[k];
          ti[b * A + k] = i[k];
        } else if (4 * b * k == A * B) {  // -i
          tr[b * A + k] = i[k];
          ti[b * A + k] = -r[k];
        } else if (8 * b * k == A * B || 8 * b * k == 3 * A * B) {  // (+-1 - i) / sqrt 2
          const float h = float(unit_cos(1, 8));
          tr[b * A + k] = 8 * b * k == A * B ? (r[k] + i[k]) * h : (i[k] - r[k]) * h;
          ti[b * A + k] = 8 * b * k == A * B ? (i[k] - r[k]) * h : (r[k] + i[k]) * -h;
        } else {
          tr[b * A + k] = r[k] * c + i[k] * s;
          ti[b * A + k] = i[k] * c - r[k] * s;
        }
      }
    }
#pragma GCC unroll 8
    for (int k = 0; k < A; ++k) {
      VF r[B], i[B];
#pragma GCC unroll 8
      for (int b = 0; b < B; ++b) r[b] = tr[b * A + k], i[b] = ti[b * A + k];
      dft<B>(r, i);
#pragma GCC unroll 8
      for (int b = 0; b < B; ++b) re[k + A * b] = r[b], im[k + A * b] = i[b];
    }
  }
};
template <>
struct Dft<6> : DftProduct<2, 3> {};
template <>
struct Dft<8> : DftProduct<4, 2> {};
template <>
struct Dft<9> : DftProduct<3, 3> {};
template <>
struct Dft<10> : DftProduct<2, 5> {};
template <>
struct Dft<12> : DftProduct<4, 3> {};
template <>
struct Dft<16> : DftProduct<4, 4> {};

// One pass over the whole array: `blocks` sub-arrays of R * m elements. Twiddles: for each j < m, (R-1)
// pairs (cos, sin) of 2 pi j q / (R m).
template <int R, bool kInverse>
void fft_pass(float* data, int64_t blocks, int64_t m, const float* twiddle, int64_t ro, int64_t io) {
  constexpr int64_t E = 2 * kLanesF;
  for (int64_t block = 0; block < blocks; ++block) {
    float* base = data + block * R * m * E;
    for (int64_t j = 0; j < m; ++j) {
      float* p = base + j * E;
      const float* w = twiddle + j * 2 * (R - 1);
      VF re[R], im[R];
#pragma GCC unroll 16
      for (int q = 0; q < R; ++q) {
        re[q] = load(p + q * m * E + ro);
        im[q] = load(p + q * m * E + io);
        if (kInverse && q && j) {
          VF a = re[q] * w[2 * q - 2] + im[q] * w[2 * q - 1];
          im[q] = im[q] * w[2 * q - 2] - re[q] * w[2 * q - 1];
          re[q] = a;
        }
      }
      dft<R>(re, im);
#pragma GCC unroll 16
      for (int q = 0; q < R; ++q) {
        if (!kInverse && q && j) {
          VF a = re[q] * w[2 * q - 2] + im[q] * w[2 * q - 1];
          im[q] = im[q] * w[2 * q - 2] - re[q] * w[2 * q - 1];
          re[q] = a;
        }
        store(p + q * m * E + ro, re[q]);
        store(p + q * m * E + io, im[q]);
      }
    }
  }
}

template <bool kInverse>
LKCONV_INLINE void fft_pass(int radix, float* data, int64_t blocks, int64_t m, const float* twiddle,
                            int64_t ro, int64_t io) {
  switch (radix) {
#define LKCONV_CASE(R) \
  case R:              \
    return fft_pass<R, kInverse>(data, blocks, m, twiddle, ro, io);
    LKCONV_CASE(2)
    LKCONV_CASE(3)
    LKCONV_CASE(4)
    LKCONV_CASE(5)
    LKCONV_CASE(6)
    LKCONV_CASE(7)
    LKCONV_CASE(8)
    LKCONV_CASE(9)
    LKCONV_CASE(10)
    LKCONV_CASE(12)
    LKCONV_CASE(16)
#undef LKCONV_CASE
  }
}

// Natural order in, digit-reversed order out.
LKCONV_INLINE void fft_forward(const FftPlan& f, float* data) {
  int64_t blocks = 1, size = f.length;
  for (size_t i = 0; i < f.radix.size(); ++i) {
    const int64_t m = size / f.radix[i];
    fft_pass<false>(f.radix[i], data, blocks, m, f.twiddle[i].data(), 0, kLanesF);
    blocks *= f.radix[i];
    size = m;
  }
}

// Digit-reversed order in, natural order out, unscaled.
LKCONV_INLINE void fft_inverse(const FftPlan& f, float* data) {
  int64_t blocks = f.length, m = 1;
  for (size_t i = f.radix.size(); i-- > 0;) {
    blocks /= f.radix[i];
    fft_pass<true>(f.radix[i], data, blocks, m, f.twiddle[i].data(), kLanesF, 0);
    m *= f.radix[i];
  }
}

}  // namespace lkconv::cpu::LKCONV_ISA
