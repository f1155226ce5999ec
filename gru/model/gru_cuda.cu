// The time steps of the GRU for NVIDIA GPUs: a whole sequence in one launch. gru_cuda.py calls it.
//
// The recurrent weights stay on the multiprocessors. A block has those of U hidden units, all three gates, half in
// registers and half in shared memory, and it computes up to MT tiles of 16 lanes, one after another in each time step.
// Blocks of the same lanes tell each other their new states (backward: the gradients of their gates) through global
// memory, which is the L2 cache here: a word that is all ones is not written yet, so data and flag are one, and a time
// step costs one write and one read of L2 and no barrier. No bf16 that a conversion makes is 0xFFFF.
//
// H hidden width, a multiple of 256; U a multiple of 16; T time steps; B lanes, a multiple of 16.
// Grid: (H / U, lanes of this launch / (16 MT), rounded up) blocks of 256 threads, all resident at once.
#ifndef HIDDEN
#define HIDDEN 1024
#endif
#ifndef UNITS
#define UNITS 32
#endif
#ifndef TILES
#define TILES 1
#endif
constexpr int H = HIDDEN, U = UNITS, MT = TILES;
typedef unsigned int u32;
typedef unsigned short u16;
constexpr int W = 8;                         // warps: each has its part of the sum over K
constexpr int PAIRS = U / 2, POINTS = 16 * PAIRS;  // threads that compute gates, two neighbouring units each
constexpr u32 MISSING = 0xFFFFFFFFu;

__device__ __forceinline__ uint4 read(const u16* p) {
  uint4 v;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}
__device__ __forceinline__ void write(u16* p, u32 v) { asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(v)); }
__device__ __forceinline__ bool missing(const uint4& v) { return v.x == MISSING || v.y == MISSING || v.z == MISSING || v.w == MISSING; }
__device__ __forceinline__ u32 pack(float low, float high) {
  u32 v;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
  return v;
}
__device__ __forceinline__ float low(u32 v) { return __uint_as_float(v << 16); }
__device__ __forceinline__ float high(u32 v) { return __uint_as_float(v & 0xFFFF0000u); }
__device__ __forceinline__ u32 word(const u16* p) { return *reinterpret_cast<const u32*>(p); }
__device__ __forceinline__ float2 two(const float* p) { return *reinterpret_cast<const float2*>(p); }
__device__ __forceinline__ float sigmoid(float x) { return __fdividef(1.f, 1.f + __expf(-x)); }
__device__ __forceinline__ float hyperbolic_tangent(float x) { return __fdividef(2.f, 1.f + __expf(-2.f * x)) - 1.f; }
__device__ __forceinline__ void mma(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// sums[16, N] over a warp's K values, A from memory row by row as it comes, weights half in registers, half shared.
template <int K, int N> struct Product {
  static constexpr int KS = K / 16, NT = N / 8, RS = KS / 2, CHUNKS = K / 32, STRIDE = N + 8;
  static constexpr int AT_ONCE = CHUNKS % 4 == 0 ? 4 : CHUNKS % 3 == 0 ? 3 : CHUNKS % 2 == 0 ? 2 : 1;
  static constexpr int SHARED = (KS - RS) * (NT / 2) * W * 32;     // uint4s
  static constexpr int SUMS = W * 16 * STRIDE;                      // floats of one of two buffers
  u32 own[RS][NT][2];
  uint4* shared;
  int g, t, warp;
  template <class Weight> __device__ void load(uint4* place, Weight weight) {
    shared = place;
    warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int s = 0; s < RS; s++)
#pragma unroll
      for (int n = 0; n < NT; n++)
#pragma unroll
        for (int half = 0; half < 2; half++) own[s][n][half] = weight(k(s) + 2 * half, n * 8 + g);
    for (int s = RS; s < KS; s++)
      for (int n = 0; n < NT; n += 2)
        shared[(((s - RS) * (NT / 2) + n / 2) * W + warp) * 32 + threadIdx.x % 32] =
            make_uint4(weight(k(s), n * 8 + g), weight(k(s) + 2, n * 8 + g), weight(k(s), n * 8 + 8 + g), weight(k(s) + 2, n * 8 + 8 + g));
  }
  __device__ int k(int s) const { return warp * K + s / 2 * 32 + 8 * t + 4 * (s % 2); }
  __device__ __forceinline__ const u16* place(const u16* row0, size_t row_stride, int chunk, int half) const {
    return row0 + (g + 8 * half) * row_stride + warp * K + 8 * t + chunk * 32;
  }
  __device__ __forceinline__ void run(const u16* row0, size_t row_stride, float* sums) {
    float c[NT][4];
#pragma unroll
    for (int n = 0; n < NT; n++) c[n][0] = c[n][1] = c[n][2] = c[n][3] = 0.f;
#pragma unroll
    for (int first = 0; first < CHUNKS; first += AT_ONCE) {
      uint4 a[AT_ONCE][2];
      bool again;
      do {
        again = false;
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++)
#pragma unroll
          for (int half = 0; half < 2; half++) a[i][half] = read(place(row0, row_stride, first + i, half));
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) again |= missing(a[i][0]) | missing(a[i][1]);
      } while (__any_sync(MISSING, again));
#pragma unroll
      for (int i = 0; i < AT_ONCE; i++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
          int s = (first + i) * 2 + half;
          u32 a0 = half ? a[i][0].z : a[i][0].x, a2 = half ? a[i][0].w : a[i][0].y;
          u32 a1 = half ? a[i][1].z : a[i][1].x, a3 = half ? a[i][1].w : a[i][1].y;
          if (s < RS) {
#pragma unroll
            for (int n = 0; n < NT; n++) mma(c[n], a0, a1, a2, a3, own[s < RS ? s : 0][n][0], own[s < RS ? s : 0][n][1]);
          } else {
#pragma unroll
            for (int n = 0; n < NT; n += 2) {
              uint4 b = shared[(((s - RS) * (NT / 2) + n / 2) * W + warp) * 32 + threadIdx.x % 32];
              mma(c[n], a0, a1, a2, a3, b.x, b.y);
              mma(c[n + 1], a0, a1, a2, a3, b.z, b.w);
            }
          }
        }
    }
    float* mine = sums + (warp * 16 + g) * STRIDE + 2 * t;
#pragma unroll
    for (int n = 0; n < NT; n++) {
      *reinterpret_cast<float2*>(mine + n * 8) = make_float2(c[n][0], c[n][1]);
      *reinterpret_cast<float2*>(mine + 8 * STRIDE + n * 8) = make_float2(c[n][2], c[n][3]);
    }
  }
  static __device__ __forceinline__ float2 total(const float* sums, int row, int column) {
    float2 all = make_float2(0.f, 0.f);
#pragma unroll
    for (int w = 0; w < W; w++) {
      float2 part = two(sums + (w * 16 + row) * STRIDE + column);
      all.x += part.x, all.y += part.y;
    }
    return all;
  }
};

// into [T, B, 3H]: W_i x for r, z, n; bias [4H] of r, z, n, s; weights [3H, H] for r, z, s; first [B, H]: the state
// before the sequence. states [T + 1, B, H] has its rounded values, then all ones, and gets the other states;
// gates [T, B, 4, H] gets r, z, n, s; last [B, H] the state after the sequence. Lanes begin at `first_lane`.
extern "C" __global__ void __launch_bounds__(256, 1) gru_forward(const u16* __restrict__ into, const float* __restrict__ bias,
    const u16* __restrict__ weights, const float* __restrict__ first, u16* states, u16* gates, float* last, int T, int B,
    int first_lane) {
  using P = Product<H / W, 3 * U>;
  extern __shared__ uint4 memory[];
  float* sums = reinterpret_cast<float*>(memory + P::SHARED);
  P product;
  const int unit0 = blockIdx.x * U, lane0 = first_lane + blockIdx.y * 16 * MT;
  product.load(memory, [&](int k, int n) { return word(weights + (size_t)(n / U * H + unit0 + n % U) * H + k); });
  const int row = threadIdx.x / PAIRS, column = threadIdx.x % PAIRS * 2, unit = unit0 + column;
  const bool points = threadIdx.x < POINTS;
  float2 h[MT], b[4];
  if (points) {
#pragma unroll
    for (int i = 0; i < 4; i++) b[i] = two(bias + i * H + unit);
#pragma unroll
    for (int m = 0; m < MT; m++)
      if (lane0 + m * 16 < B) h[m] = two(first + (size_t)(lane0 + m * 16 + row) * H + unit);
  }
  __syncthreads();
  int turn = 0;
  for (int t = 0; t < T; t++) {
#pragma unroll
    for (int m = 0; m < MT; m++, turn ^= 1) {
      if (lane0 + m * 16 >= B) break;
      const size_t lane = (size_t)t * B + lane0 + m * 16;
      u32 x[3];
      if (points)
#pragma unroll
        for (int i = 0; i < 3; i++) x[i] = word(into + (lane + row) * 3 * H + i * H + unit);
      float* buffer = sums + turn * P::SUMS;
      product.run(states + lane * H, H, buffer);
      __syncthreads();
      if (points) {
        float2 r = P::total(buffer, row, column), z = P::total(buffer, row, U + column), s = P::total(buffer, row, 2 * U + column), n;
        r.x = sigmoid(r.x + low(x[0]) + b[0].x), r.y = sigmoid(r.y + high(x[0]) + b[0].y);
        z.x = sigmoid(z.x + low(x[1]) + b[1].x), z.y = sigmoid(z.y + high(x[1]) + b[1].y);
        s.x += b[3].x, s.y += b[3].y;
        n.x = hyperbolic_tangent(low(x[2]) + b[2].x + r.x * s.x), n.y = hyperbolic_tangent(high(x[2]) + b[2].y + r.y * s.y);
        h[m].x = n.x + z.x * (h[m].x - n.x), h[m].y = n.y + z.y * (h[m].y - n.y);
        write(states + (lane + B + row) * H + unit, pack(h[m].x, h[m].y));
        u16* kept = gates + (lane + row) * 4 * H + unit;
        *reinterpret_cast<u32*>(kept) = pack(r.x, r.y);
        *reinterpret_cast<u32*>(kept + H) = pack(z.x, z.y);
        *reinterpret_cast<u32*>(kept + 2 * H) = pack(n.x, n.y);
        *reinterpret_cast<u32*>(kept + 3 * H) = pack(s.x, s.y);
      }
    }
  }
  if (points)
#pragma unroll
    for (int m = 0; m < MT; m++)
      if (lane0 + m * 16 < B) *reinterpret_cast<float2*>(last + (size_t)(lane0 + m * 16 + row) * H + unit) = h[m];
}

// d_out [T, B, H] and d_last [B, H]: the gradients of the states and of `last`. d_gates [T, B, 4H], all ones before,
// gets those of the sums of n, r, z and s; d_first [B, H] those of `first`; some rows of d_bias [B, 4H], zeros before, get
// sums of d_gates.
extern "C" __global__ void __launch_bounds__(256, 1) gru_backward(const u16* __restrict__ d_out, const float* __restrict__ d_last,
    const u16* __restrict__ gates, const u16* __restrict__ states, const u16* __restrict__ weights, u16* d_gates, float* d_first,
    float* d_bias, int T, int B, int first_lane) {
  using P = Product<3 * H / W, U>;
  extern __shared__ uint4 memory[];
  float* sums = reinterpret_cast<float*>(memory + P::SHARED);
  P product;
  const int unit0 = blockIdx.x * U, lane0 = first_lane + blockIdx.y * 16 * MT;
  product.load(memory, [&](int k, int n) {
    return (u32)weights[(size_t)k * H + unit0 + n] | (u32)weights[(size_t)(k + 1) * H + unit0 + n] << 16;
  });
  const int row = threadIdx.x / PAIRS, column = threadIdx.x % PAIRS * 2, unit = unit0 + column;
  const bool points = threadIdx.x < POINTS;
  float2 keep[MT], bias[4];
#pragma unroll
  for (int i = 0; i < 4; i++) bias[i] = make_float2(0.f, 0.f);
#pragma unroll
  for (int m = 0; m < MT; m++)
    if (points && lane0 + m * 16 < B) keep[m] = two(d_last + (size_t)(lane0 + m * 16 + row) * H + unit);
  __syncthreads();
  int turn = 0;
  for (int t = T - 1; t >= -1; t--) {
#pragma unroll
    for (int m = 0; m < MT; m++, turn ^= 1) {
      if (lane0 + m * 16 >= B) break;
      const long lane = (long)t * B + lane0 + m * 16;
      u32 kept[4], before, d;
      if (points && t >= 0) {
        const u16* of = gates + (lane + row) * 4 * H + unit;
#pragma unroll
        for (int i = 0; i < 4; i++) kept[i] = word(of + i * H);
        before = word(states + (lane + row) * H + unit);
        d = word(d_out + (lane + row) * H + unit);
      }
      float* buffer = sums + turn * P::SUMS;
      if (t < T - 1) product.run(d_gates + (lane + B) * 4 * H + H, 4 * H, buffer);
      __syncthreads();
      if (points) {
        float2 dh = keep[m];
        if (t < T - 1) {
          float2 through = P::total(buffer, row, column);
          dh.x += through.x, dh.y += through.y;
        }
        if (t < 0) {
          *reinterpret_cast<float2*>(d_first + (size_t)(lane0 + m * 16 + row) * H + unit) = dh;
        } else {
          dh.x += low(d), dh.y += high(d);
          float dn[2], dr[2], dz[2], ds[2];
#pragma unroll
          for (int i = 0; i < 2; i++) {
            float r = i ? high(kept[0]) : low(kept[0]), z = i ? high(kept[1]) : low(kept[1]), n = i ? high(kept[2]) : low(kept[2]);
            float s = i ? high(kept[3]) : low(kept[3]), h = i ? high(before) : low(before), dy = i ? dh.y : dh.x;
            dn[i] = dy * (1.f - z) * (1.f - n * n);
            dr[i] = dn[i] * s * r * (1.f - r);
            dz[i] = dy * (h - n) * z * (1.f - z);
            ds[i] = dn[i] * r;
            (i ? keep[m].y : keep[m].x) = dy * z;
          }
          bias[0].x += dn[0], bias[0].y += dn[1], bias[1].x += dr[0], bias[1].y += dr[1];
          bias[2].x += dz[0], bias[2].y += dz[1], bias[3].x += ds[0], bias[3].y += ds[1];
          u16* to = d_gates + (lane + row) * 4 * H + unit;
          write(to + H, pack(dr[0], dr[1]));
          write(to + 2 * H, pack(dz[0], dz[1]));
          write(to + 3 * H, pack(ds[0], ds[1]));
          *reinterpret_cast<u32*>(to) = pack(dn[0], dn[1]);
        }
      }
    }
  }
  if (points)
#pragma unroll
    for (int i = 0; i < 4; i++) *reinterpret_cast<float2*>(d_bias + (size_t)(lane0 + row) * 4 * H + i * H + unit) = bias[i];
}
