// The time steps of the GRU for Hopper (sm_90a), for many lanes: gru_cuda.cu with wgmma and clusters. gru_cuda.py calls it.
//
// A block has the recurrent weights of U hidden units in shared memory, K-major with a swizzle of 128 bytes: the B operand of
// wgmma. Its lanes are 64. Each of its two warpgroups has half of K: a warp reads the states (backward: the gradients of the
// gates) of 16 lanes from L2 into registers, a burst of chunks of 32 k values at a time, and multiplies them as A fragments.
// Each warpgroup then computes half of the gates, and gives the other the sums of the other's half.
//
// C blocks of neighbouring units and the same lanes are a cluster and split K: each reads only 1 / C of L2's words, and they
// send each other partial sums through distributed shared memory. Columns of the products: first those of the own units, then
// those of the next block of the cluster (rank + 1), and so on, so that sums have one order.
//
// As in gru_cuda.cu, words in L2 are all ones until they are written. Here they are written and read in units of 8 bytes, of
// which one word is tested. K is permuted within 32 values, alike in A and B, so that 16 neighbouring bytes of a thread serve two
// fragments; units are permuted within 16, so that a thread's four units (accumulators of two n8 tiles) are neighbours.
//
// H hidden width, a multiple of 256; U 16 or 32; grid: (H / U, lanes of this launch / 64) blocks of 256 threads, all resident.
#ifndef HIDDEN
#define HIDDEN 1024
#endif
#ifndef UNITS
#define UNITS 32
#endif
constexpr int H = HIDDEN, U = UNITS, THREADS = 256;
// A narrow block gains from a cluster in the forward pass too. Chunks that a warpgroup reads at once: 16 registers each, at most.
constexpr int CLUSTER_FORWARD = 32 / U, CLUSTER_BACKWARD = 2, AT_FORWARD = 4, AT_BACKWARD = 8;
// A slot is 16 units and one of the rows g, g + 8: four units of a thread. A warpgroup computes the gates of OWN slots.
constexpr int OWN = U / 16;
typedef unsigned int u32;
typedef unsigned short u16;
constexpr u32 MISSING = 0xFFFFFFFFu, ALL = 0xFFFFFFFFu;

// ---- memory ----
// ld: two 8-byte units that other blocks write; a unit is there or not as a whole.
__device__ __forceinline__ void read(u32 (&v)[4], const u16* p) {
  asm volatile("{ .reg .b64 x, y; ld.relaxed.gpu.global.v2.b64 {x, y}, [%4]; mov.b64 {%0, %1}, x; mov.b64 {%2, %3}, y; }"
               : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
               : "l"(p)
               : "memory");
}
__device__ __forceinline__ u32 read_word(const u16* p) {
  u32 v;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
// Waits until of each of count pieces of 16 units, of one lane, the last word is there.
__device__ __forceinline__ void wait_for_lane(const u16* p, int count) {
  bool again;
  do {
    again = false;
    for (int i = threadIdx.x % 32; i < count; i += 32) again |= read_word(p + i * 16) == MISSING;
  } while (__any_sync(ALL, again));
}
__device__ __forceinline__ void write(u16* p, uint2 v) {
  asm volatile("{ .reg .b64 x; mov.b64 x, {%1, %2}; st.relaxed.gpu.global.b64 [%0], x; }" ::"l"(p), "r"(v.x), "r"(v.y)
               : "memory");
}
// Read-only values, four bf16; volatile, so that the load stays where it is written: well before its use.
__device__ __forceinline__ uint2 four(const u16* p) {
  uint2 v;
  asm volatile("ld.global.nc.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p));
  return v;
}
__device__ __forceinline__ void store(u16* p, uint2 v) { *reinterpret_cast<uint2*>(p) = v; }
__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// ---- numbers ----
__device__ __forceinline__ u32 pack(float low, float high) {
  u32 v;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
  return v;
}
__device__ __forceinline__ uint2 pack4(const float (&v)[4]) { return make_uint2(pack(v[0], v[1]), pack(v[2], v[3])); }
__device__ __forceinline__ float low(u32 v) { return __uint_as_float(v << 16); }
__device__ __forceinline__ float high(u32 v) { return __uint_as_float(v & 0xFFFF0000u); }
__device__ __forceinline__ float part(uint2 v, int i) {
  return i == 0 ? low(v.x) : i == 1 ? high(v.x) : i == 2 ? low(v.y) : high(v.y);
}
__device__ __forceinline__ float sigmoid(float x) { return __fdividef(1.f, 1.f + __expf(-x)); }
__device__ __forceinline__ float hyperbolic_tangent(float x) { return __fdividef(2.f, 1.f + __expf(-2.f * x)) - 1.f; }

// ---- wgmma: d[64, N] += a[64, 16] b[16, N], a from registers ----
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}
template <int COUNT>
__device__ __forceinline__ void settle(float (&d)[COUNT]) {  // no use of d moves across this
#pragma unroll
  for (int i = 0; i < COUNT; i++) asm volatile("" : "+f"(d[i])::"memory");
}
__device__ constexpr int burst_of(int chunks, int most) {
  return most > chunks ? burst_of(chunks, chunks) : chunks % most == 0 && most % 2 == 0 ? most : burst_of(chunks, most - 1);
}
template <int N>
struct Wgmma;
#define EIGHT(i) \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define WGMMA(N, SUMS, A, DESCRIPTOR, ...)                                                                          \
  template <>                                                                                                       \
  struct Wgmma<N> {                                                                                                 \
    static __device__ __forceinline__ void run(float (&d)[N / 2], u32 a0, u32 a1, u32 a2, u32 a3, u32 b) {          \
      asm volatile("{ .reg .pred p; .reg .b64 d; setp.ne.b32 p, 1, 0; mov.b64 d, {" DESCRIPTOR                      \
                   ", 0x40000040}; "                                                                                \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" SUMS "}, {" A "}, d, p, 1, 1, 0; }" \
                   : __VA_ARGS__                                                                                    \
                   : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b));                                                   \
    }                                                                                                               \
  };
#define D16 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define D32 D16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define D48 D32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
WGMMA(32, D16, "%16,%17,%18,%19", "%20", EIGHT(0), EIGHT(8))
WGMMA(64, D32, "%32,%33,%34,%35", "%36", EIGHT(0), EIGHT(8), EIGHT(16), EIGHT(24))
WGMMA(96, D48, "%48,%49,%50,%51", "%52", EIGHT(0), EIGHT(8), EIGHT(16), EIGHT(24), EIGHT(32), EIGHT(40))

// sums[64, N] += A[64, 32 CHUNKS] B, A from L2 as it comes, B in shared memory: panels of 64 k values, each N rows of 128 bytes.
// AT chunks of 32 k values are a burst: its words are copied to fragments, which wgmma wants in four consecutive registers, and
// the loads of the next burst are on their way while its products run.
template <int CHUNKS, int N, int AT>
struct Product {
  static constexpr int BURSTS = CHUNKS / AT;
  static_assert(CHUNKS % AT == 0 && AT % 2 == 0 && N % 8 == 0, "");
  static constexpr int PANEL = N * 128;  // bytes
  static constexpr int BYTES = CHUNKS / 2 * PANEL;
  struct Burst {
    u32 v[AT][2][4];
  };  // [chunk][row g, row g + 8][word]

  // Where the 16 bytes go that are the logical k values 8 piece ... 8 piece + 7 of chunk, for column n.
  static __device__ __forceinline__ int offset(int n, int chunk, int piece) {
    return chunk / 2 * PANEL + n * 128 + ((chunk % 2 * 4 + piece) ^ (n % 8)) * 16;
  }
  // The low word of a matrix descriptor; the high word is always that of swizzle 128 B, 1024 bytes between groups of 8 columns.
  static __device__ __forceinline__ u32 descriptor(u32 base) { return __shfl_sync(ALL, 1 << 16 | (base & 0x3FFFF) >> 4, 0); }
  static __device__ __forceinline__ void load(Burst& a, const u16* row, const u16* row8, int burst) {
#pragma unroll
    for (int c = 0; c < AT; c++) read(a.v[c][0], row + (burst * AT + c) * 32), read(a.v[c][1], row8 + (burst * AT + c) * 32);
  }
  static __device__ __forceinline__ bool missing(const u32 (&v)[2][4]) {
    return v[0][1] == MISSING | v[0][3] == MISSING | v[1][1] == MISSING | v[1][3] == MISSING;
  }
  static __device__ __forceinline__ bool missing(const Burst& a) {  // of the warp
    bool any = false;
#pragma unroll
    for (int c = 0; c < AT; c++) any |= missing(a.v[c]);
    return __any_sync(ALL, any);
  }
  // After load of burst 0 to a; adds to sums.
  static __device__ __forceinline__ void run(Burst& a, const u16* row, const u16* row8, u32 b, float (&sums)[N / 2]) {
    settle(sums);
#pragma unroll
    for (int burst = 0; burst < BURSTS; burst++) {
      while (missing(a)) {
#pragma unroll
        for (int c = 0; c < AT; c++)  // a thread asks again for what it has not got
          if (missing(a.v[c])) read(a.v[c][0], row + (burst * AT + c) * 32), read(a.v[c][1], row8 + (burst * AT + c) * 32);
      }
      wgmma_wait<0>();
      u32 f[AT * 2][4];
#pragma unroll
      for (int c = 0; c < AT * 2; c++) {
        f[c][0] = a.v[c / 2][0][c % 2 * 2], f[c][1] = a.v[c / 2][1][c % 2 * 2];
        f[c][2] = a.v[c / 2][0][c % 2 * 2 + 1], f[c][3] = a.v[c / 2][1][c % 2 * 2 + 1];
#pragma unroll
        for (int w = 0; w < 4; w++) asm volatile("" : "+r"(f[c][w]));
      }
      if (burst + 1 < BURSTS) load(a, row, row8, burst + 1);
      wgmma_fence();
#pragma unroll
      for (int c = 0; c < AT * 2; c++) {
        const int step = burst * AT * 2 + c;
        Wgmma<N>::run(sums, f[c][0], f[c][1], f[c][2], f[c][3], b + (step / 4 * (PANEL / 16) + step % 4 * 2));
      }
      wgmma_commit();
    }
    wgmma_wait<0>();
    settle(sums);
  }
  // The first burst. Warpgroup 1 asks when 0 has asked, so that 0 has products to compute while 1 waits.
  static __device__ __forceinline__ void start(Burst& a, const u16* row, const u16* row8, int group) {
    if (group == 1) asm volatile("bar.sync 3, 256;" ::: "memory");
    load(a, row, row8, 0);
    if (group == 0) asm volatile("bar.arrive 3, 256;" ::: "memory");
  }
};

// Warp w of a warpgroup has the lanes 16 w ..., a thread the rows g and g + 8 and, of each 16 units, 4 t ... 4 t + 3.
struct Place {
  int group, warp, g, t, slot0;
  __device__ Place()
      : group(__shfl_sync(ALL, threadIdx.x / 128, 0)),
        warp(threadIdx.x / 32 % 4),
        g(threadIdx.x % 32 / 4),
        t(threadIdx.x % 4),
        slot0(group * OWN) {}
  __device__ int row(int j) const { return (slot0 + j) % 2 * 8; }  // of own slot j, after the thread's lane
  __device__ int unit(int j) const { return (slot0 + j) / 2 * 16; }
};
__device__ __forceinline__ int unit_of(int column) {
  return column / 16 * 16 + column % 8 / 2 * 4 + column % 16 / 8 * 2 + column % 2;
}
// Index into the accumulators of one gate: of the four units of a slot the i-th.
__device__ __forceinline__ constexpr int spot(int slot, int i) { return (slot / 2 * 2 + i / 2) * 4 + slot % 2 * 2 + i % 2; }
// Adds the sums of 16 values over the eight threads of a warp with the same t: thread g keeps those of values 2 g and 2 g + 1.
template <int HALF>
__device__ __forceinline__ void add_half(float (&v)[16], int g) {
  const bool upper = g & (HALF / 2);
#pragma unroll
  for (int i = 0; i < HALF; i++) {
    const float given = upper ? v[i] : v[i + HALF], kept = upper ? v[i + HALF] : v[i];
    v[i] = kept + __shfl_xor_sync(ALL, given, HALF * 2);
  }
}
__device__ __forceinline__ void add_over_lanes(float (&v)[16], int g, float2& total) {
  add_half<8>(v, g), add_half<4>(v, g), add_half<2>(v, g);
  total.x += v[0], total.y += v[1];
}
__device__ __forceinline__ char* aligned(void* p) {
  return reinterpret_cast<char*>(p) + (1024 - shared_address(p) % 1024) % 1024;
}
__device__ __forceinline__ void written_for_wgmma() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncthreads();
}
// Barriers 1 and 2: warpgroup 0 (1) has read its part of the sums, so that the other may write the next ones.
__device__ __forceinline__ void sums_read(int group) { asm volatile("bar.arrive %0, 256;" ::"r"(1 + group) : "memory"); }
__device__ __forceinline__ void wait_until_read(int group) { asm volatile("bar.sync %0, 256;" ::"r"(1 + group) : "memory"); }
template <int GROUP, int COUNT>
__device__ __forceinline__ void give(const float (&sums)[COUNT], int base, float4* to) {
#pragma unroll
  for (int j = 0; j < OWN; j++) {
    constexpr int first = (1 - GROUP) * OWN;
    to[j * 128] = make_float4(sums[base + spot(first + j, 0)], sums[base + spot(first + j, 1)],
                              sums[base + spot(first + j, 2)], sums[base + spot(first + j, 3)]);
  }
}
template <int GROUP, int COUNT>
__device__ __forceinline__ void take(const float (&sums)[COUNT], int base, const float4* from, float (&own)[OWN][4]) {
#pragma unroll
  for (int j = 0; j < OWN; j++) {
    const float4 v = from[j * 128];
    constexpr int first = GROUP * OWN;
    own[j][0] = sums[base + spot(first + j, 0)] + v.x, own[j][1] = sums[base + spot(first + j, 1)] + v.y;
    own[j][2] = sums[base + spot(first + j, 2)] + v.z, own[j][3] = sums[base + spot(first + j, 3)] + v.w;
  }
}

// ---- clusters ----
__device__ __forceinline__ u32 cluster_rank() {
  u32 v;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(v));
  return v;
}
__device__ __forceinline__ void cluster_barrier() {
  asm volatile("barrier.cluster.arrive.release.aligned;\n barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
__device__ __forceinline__ u32 at_rank(u32 address, u32 rank) {  // the same place in the shared memory of another block
  u32 v;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(v) : "r"(address), "r"(rank));
  return v;
}
__device__ __forceinline__ void send(u32 to, const float (&v)[4], u32 barrier) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(to),
               "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3]), "r"(barrier)
               : "memory");
}
// (Arrivals and waits with the default semantics, as CUTLASS has them between blocks too: .cluster would make each a MEMBAR.GPU.)
__device__ __forceinline__ void wait_for(u32 barrier, u32 parity) {
  u32 done;
  do {
    asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                 : "=r"(done)
                 : "r"(barrier), "r"(parity)
                 : "memory");
  } while (!done);
}
// Both halves of K of all blocks of the cluster added up, of this warpgroup's own slots. Warps exchange with the same warps of the
// other blocks: full[warp] counts the bytes that have come, empty[warp] the blocks that have read what this one sent before.
template <int GATES, int C>
struct Exchange {
  static constexpr int SCRATCH = 2 * OWN * 128, RECEIVED = (C - 1) * GATES * OWN * THREADS;  // float4s
  float4 *scratch, *received;
  u32 full, empty, rank, steps;
  __device__ Exchange(float4* place, u32 rank) : scratch(place), received(place + SCRATCH), rank(rank), steps(0) {
    const u32 barriers = shared_address(received + RECEIVED), warp = threadIdx.x / 32;
    full = barriers + 8 * warp, empty = full + 64;
    if constexpr (C > 1) {
      if (threadIdx.x % 32 == 0) {
        asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(full) : "memory");
        asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(empty), "n"(C > 1 ? C - 1 : 1) : "memory");
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
      }
      __syncthreads();
      cluster_barrier();
    }
  }
  __device__ __forceinline__ void run(const float (&sums)[C * GATES * U / 2], int group, bool last,
                                      float (&own)[GATES][OWN][4]) {
    float4* const here = scratch + threadIdx.x % 128;
    if (C > 1 && threadIdx.x % 32 == 0)
      asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(full), "r"((C - 1) * GATES * OWN * 16 * 32)
                   : "memory");
#pragma unroll
    for (int j = C - 1; j >= 0; j--)
#pragma unroll
      for (int i = 0; i < GATES; i++) {
        const int base = (j * GATES + i) * (U / 2);
        if (steps > 0 || j < C - 1 || i > 0) wait_until_read(1 - group);
        if (group == 0) give<0>(sums, base, here + OWN * 128);
        else give<1>(sums, base, here);
        __syncthreads();
        if (group == 0) take<0>(sums, base, here, own[i]);
        else take<1>(sums, base, here + OWN * 128, own[i]);
        if (!last || j > 0 || i < GATES - 1) sums_read(group);
        if (j > 0) {
          if (j == C - 1 && i == 0 && steps > 0) wait_for(empty, (steps - 1) & 1);
          const u32 to = (rank + j) % C, barrier = at_rank(full, to);
#pragma unroll
          for (int k = 0; k < OWN; k++)
            send(at_rank(shared_address(received + (((j - 1) * GATES + i) * OWN + k) * THREADS + threadIdx.x), to),
                 own[i][k], barrier);
        }
      }
    if constexpr (C > 1) {
      wait_for(full, steps & 1);
#pragma unroll
      for (int j = 1; j < C; j++)
#pragma unroll
        for (int i = 0; i < GATES; i++)
#pragma unroll
          for (int k = 0; k < OWN; k++) {
            const float4 v = received[(((j - 1) * GATES + i) * OWN + k) * THREADS + threadIdx.x];
            own[i][k][0] += v.x, own[i][k][1] += v.y, own[i][k][2] += v.z, own[i][k][3] += v.w;
          }
      __syncwarp();
      if (threadIdx.x % 32 == 0)
#pragma unroll
        for (int j = 1; j < C; j++)
          asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(at_rank(empty, (rank + C - j) % C)) : "memory");
    }
    steps++;
  }
  __device__ __forceinline__ void finish() {  // no block leaves while another may write to it
    if constexpr (C > 1) cluster_barrier();
  }
};

// into [T, B, 3H]: W_i x, for r, z, n; bias [4H] of r, z, n, s; weights [3H, H] for r, z, s; first [B, H].
// states [T + 1, B, H] have bf16(first) and then all ones; gates [T, B, 4, H] get r, z, n, s; last [B, H] gets h_T.
extern "C" __global__ void __launch_bounds__(THREADS, 1) __cluster_dims__(CLUSTER_FORWARD, 1, 1)
    gru_forward(const u16* __restrict__ into, const float* __restrict__ bias, const u16* __restrict__ weights,
                const float* __restrict__ first, u16* states, u16* gates, float* last, int T, int B, int first_lane) {
  constexpr int C = CLUSTER_FORWARD, SLICE = H / C;
  using P = Product<SLICE / 64, C * 3 * U, burst_of(SLICE / 64, AT_FORWARD)>;
  extern __shared__ uint4 memory[];
  char* const panels = aligned(memory);
  float* const biases = reinterpret_cast<float*>(panels + 2 * P::BYTES);
  const Place at;
  const int unit0 = blockIdx.x * U, lane0 = first_lane + blockIdx.y * 64;

  const int rank = C > 1 ? cluster_rank() : 0;
  for (int i = threadIdx.x; i < C * 3 * U * (SLICE / 32); i += THREADS) {
    const int chunk = i / 8 % (SLICE / 32), n = i / 8 / (SLICE / 32) * 8 + i % 8;  // without bank conflicts
    const int units = (blockIdx.x - rank + (rank + n / (3 * U)) % C) * U;
    const uint4* of = reinterpret_cast<const uint4*>(weights + (size_t)(n % (3 * U) / U * H + units + unit_of(n % U)) * H +
                                                     rank * SLICE + chunk * 32);
    const uint4 v0 = of[0], v1 = of[1], v2 = of[2], v3 = of[3];
    *reinterpret_cast<uint4*>(panels + P::offset(n, chunk, 0)) = make_uint4(v0.x, v1.x, v2.x, v3.x);
    *reinterpret_cast<uint4*>(panels + P::offset(n, chunk, 1)) = make_uint4(v0.y, v1.y, v2.y, v3.y);
    *reinterpret_cast<uint4*>(panels + P::offset(n, chunk, 2)) = make_uint4(v0.z, v1.z, v2.z, v3.z);
    *reinterpret_cast<uint4*>(panels + P::offset(n, chunk, 3)) = make_uint4(v0.w, v1.w, v2.w, v3.w);
  }
  for (int i = threadIdx.x; i < 4 * U; i += THREADS) biases[i] = bias[i / U * H + unit0 + i % U];
  written_for_wgmma();
  Exchange<3, C> exchange(reinterpret_cast<float4*>(biases + 4 * U), rank);

  const u32 b = P::descriptor(shared_address(panels + at.group * P::BYTES));
  const size_t lane = lane0 + at.warp * 16 + at.g;  // of row g
  const int unit = unit0 + 4 * at.t;                // of the first 16
  float4 h[OWN];
  uint2 x[OWN][3];
#pragma unroll
  for (int j = 0; j < OWN; j++) {
    h[j] = *reinterpret_cast<const float4*>(first + (lane + at.row(j)) * H + unit + at.unit(j));
    if (T > 0)
#pragma unroll
      for (int i = 0; i < 3; i++) x[j][i] = four(into + (lane + at.row(j)) * 3 * H + i * H + unit + at.unit(j));
  }
#pragma unroll 1
  for (int t = 0; t < T; t++) {
    const size_t now = (size_t)t * B + lane;
    const u16* const row = states + now * H + rank * SLICE + at.group * (SLICE / 2) + 8 * at.t;
    const u16* const row8 = row + 8 * H;
    P::Burst a;
    P::start(a, row, row8, at.group);
    float sums[C * 3 * U / 2];  // r, z, s: each U / 2
#pragma unroll
    for (int i = 3 * U / 2; i < C * 3 * U / 2; i++) sums[i] = 0.f;
#pragma unroll
    for (int j = 0; j < OWN; j++)
#pragma unroll
      for (int i = 0; i < 3; i++) {
        const float4 v = *reinterpret_cast<const float4*>(biases + (i == 2 ? 3 : i) * U + at.unit(j) + 4 * at.t);
#pragma unroll
        for (int e = 0; e < 4; e++) {
          const float of = (e == 0 ? v.x : e == 1 ? v.y : e == 2 ? v.z : v.w) + (i < 2 ? part(x[j][i], e) : 0.f);
          sums[i * (U / 2) + spot(j, e)] = at.group == 0 ? of : 0.f;
          sums[i * (U / 2) + spot(OWN + j, e)] = at.group == 0 ? 0.f : of;
        }
      }
    uint2 xn[OWN];
#pragma unroll
    for (int j = 0; j < OWN; j++) xn[j] = x[j][2];
    P::run(a, row, row8, b, sums);
    if (t + 1 < T)
#pragma unroll
      for (int j = 0; j < OWN; j++)
#pragma unroll
        for (int i = 0; i < 3; i++) x[j][i] = four(into + (now + B + at.row(j)) * 3 * H + i * H + unit + at.unit(j));
    float own[3][OWN][4];
    exchange.run(sums, at.group, t == T - 1, own);
    uint2 kept[OWN][4];
#pragma unroll
    for (int j = 0; j < OWN; j++) {
      const float4 v = *reinterpret_cast<const float4*>(biases + 2 * U + at.unit(j) + 4 * at.t);
      const float4 was = h[j];
      float r[4], z[4], n[4], after[4] = {was.x, was.y, was.z, was.w};
#pragma unroll
      for (int e = 0; e < 4; e++) {
        r[e] = sigmoid(own[0][j][e]);
        z[e] = sigmoid(own[1][j][e]);
        n[e] = hyperbolic_tangent(part(xn[j], e) + (e == 0 ? v.x : e == 1 ? v.y : e == 2 ? v.z : v.w) + r[e] * own[2][j][e]);
        after[e] = n[e] + z[e] * (after[e] - n[e]);
      }
      write(states + (now + B + at.row(j)) * H + unit + at.unit(j), pack4(after));
      h[j] = make_float4(after[0], after[1], after[2], after[3]);
      kept[j][0] = pack4(r), kept[j][1] = pack4(z), kept[j][2] = pack4(n), kept[j][3] = pack4(own[2][j]);
    }
#pragma unroll
    for (int j = 0; j < OWN; j++)
#pragma unroll
      for (int i = 0; i < 4; i++) store(gates + (now + at.row(j)) * 4 * H + i * H + unit + at.unit(j), kept[j][i]);
  }
#pragma unroll
  for (int j = 0; j < OWN; j++) *reinterpret_cast<float4*>(last + (lane + at.row(j)) * H + unit + at.unit(j)) = h[j];
  exchange.finish();
}

// d_out [T, B, H]; d_last [B, H]; gates and states as gru_forward left them; d_gates [T, B, 4H], of n, r, z, s, all ones before;
// d_first [B, H] gets the gradient of the first states; some rows of d_bias [B, 4H], zeros before, get sums of d_gates.
extern "C" __global__ void __launch_bounds__(THREADS, 1) __cluster_dims__(CLUSTER_BACKWARD, 1, 1)
    gru_backward(const u16* __restrict__ d_out, const float* __restrict__ d_last, const u16* __restrict__ gates,
                 const u16* __restrict__ states, const u16* __restrict__ weights, u16* d_gates, float* d_first,
                 float* d_bias, int T, int B, int first_lane) {
  constexpr int C = CLUSTER_BACKWARD, SLICE = 3 * H / C;
  using P = Product<SLICE / 64, C * U, burst_of(SLICE / 64, AT_BACKWARD)>;
  extern __shared__ uint4 memory[];
  char* const panels = aligned(memory);
  const Place at;
  const int unit0 = blockIdx.x * U, lane0 = first_lane + blockIdx.y * 64;

  const int rank = C > 1 ? cluster_rank() : 0;
  // The words of two neighbouring units (columns n and n + 1), 8 k values each.
#pragma unroll 4
  for (int i = threadIdx.x; i < C * U / 2 * 4 * (SLICE / 32); i += THREADS) {
    const int n = i % (C * U / 2) * 2, piece = i / (C * U / 2) % 4, chunk = i / (C * U / 2) / 4;
    const int units = (blockIdx.x - rank + (rank + n / U) % C) * U;
    const u16* of = weights + (size_t)(rank * SLICE + chunk * 32 + 2 * piece) * H + units + unit_of(n % U);
    u32 one[4], two[4];
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const u32 k0 = *reinterpret_cast<const u32*>(of + (size_t)(8 * j) * H),
                k1 = *reinterpret_cast<const u32*>(of + (size_t)(8 * j + 1) * H);
      one[j] = __byte_perm(k0, k1, 0x5410), two[j] = __byte_perm(k0, k1, 0x7632);
    }
    *reinterpret_cast<uint4*>(panels + P::offset(n, chunk, piece)) = make_uint4(one[0], one[1], one[2], one[3]);
    *reinterpret_cast<uint4*>(panels + P::offset(n + 1, chunk, piece)) = make_uint4(two[0], two[1], two[2], two[3]);
  }
  written_for_wgmma();
  Exchange<1, C> exchange(reinterpret_cast<float4*>(panels + 2 * P::BYTES), rank);

  const u32 b = P::descriptor(shared_address(panels + at.group * P::BYTES));
  const size_t lane = lane0 + at.warp * 16 + at.g;
  const int unit = unit0 + 4 * at.t;
  float dh[1][OWN][4];
  float2 bias = make_float2(0.f, 0.f);  // of two of the 16 gates and units of the warp's four threads t
  uint2 kept[OWN][6];  // r, z, n, s, the state before, d_out
#pragma unroll
  for (int j = 0; j < OWN; j++) {
    const size_t from = (lane + at.row(j)) * H + unit + at.unit(j);
    const float4 v = *reinterpret_cast<const float4*>(d_last + from);
    dh[0][j][0] = v.x, dh[0][j][1] = v.y, dh[0][j][2] = v.z, dh[0][j][3] = v.w;
    if (T > 0) {
      const size_t place = (size_t)(T - 1) * B + lane + at.row(j);
#pragma unroll
      for (int i = 0; i < 4; i++) kept[j][i] = four(gates + place * 4 * H + i * H + unit + at.unit(j));
      kept[j][4] = four(states + place * H + unit + at.unit(j));
      const uint2 d = four(d_out + place * H + unit + at.unit(j));
#pragma unroll
      for (int e = 0; e < 4; e++) dh[0][j][e] += part(d, e);
    }
  }
#pragma unroll 1
  for (int t = T - 1; t >= 0; t--) {
    const size_t now = (size_t)t * B + lane;
    uint2 next[OWN][6];  // what the step before needs
#pragma unroll
    for (int j = 0; j < OWN; j++) {
      const size_t place = now - B + at.row(j);
      next[j][5] = make_uint2(0, 0);
      if (t > 0) {
        next[j][5] = four(d_out + place * H + unit + at.unit(j));
#pragma unroll
        for (int i = 0; i < 4; i++) next[j][i] = four(gates + place * 4 * H + i * H + unit + at.unit(j));
        next[j][4] = four(states + place * H + unit + at.unit(j));
      }
    }
    uint2 dn_kept[OWN];
    float over_rows[16];  // [n, r, z, s][unit]
#pragma unroll
    for (int j = 0; j < OWN; j++) {
      float dn[4], dr[4], dz[4], ds[4];
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const float r = part(kept[j][0], e), z = part(kept[j][1], e), n = part(kept[j][2], e), s = part(kept[j][3], e);
        const float h = part(kept[j][4], e), dy = dh[0][j][e];
        dn[e] = dy * (1.f - z) * (1.f - n * n);
        dr[e] = dn[e] * s * r * (1.f - r);
        dz[e] = dy * (h - n) * z * (1.f - z);
        ds[e] = dn[e] * r;
        dh[0][j][e] = dy * z;
        const float four_gates[4] = {dn[e], dr[e], dz[e], ds[e]};
#pragma unroll
        for (int gate = 0; gate < 4; gate++)
          over_rows[gate * 4 + e] = j ? over_rows[gate * 4 + e] + four_gates[gate] : four_gates[gate];
      }
      u16* const to = d_gates + (now + at.row(j)) * 4 * H + unit + at.unit(j);
      write(to + H, pack4(dr));
      write(to + 2 * H, pack4(dz));
      write(to + 3 * H, pack4(ds));
      dn_kept[j] = pack4(dn);
    }
#pragma unroll
    for (int j = 0; j < OWN; j++) store(d_gates + (now + at.row(j)) * 4 * H + unit + at.unit(j), dn_kept[j]);

    const u16* const row = d_gates + now * 4 * H + H + rank * SLICE + at.group * (SLICE / 2) + 8 * at.t;
    const u16* const row8 = row + 8 * 4 * H;
    wait_for_lane(
        d_gates + ((size_t)t * B + lane0 + at.warp * 16 + 15) * 4 * H + H + rank * SLICE + at.group * (SLICE / 2) + 14,
        SLICE / 32);
    P::Burst a;
    P::start(a, row, row8, at.group);
    float sums[C * U / 2];
#pragma unroll
    for (int i = U / 2; i < C * U / 2; i++) sums[i] = 0.f;
#pragma unroll
    for (int j = 0; j < OWN; j++) {
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const float of = dh[0][j][e] + part(next[j][5], e);
        sums[spot(j, e)] = at.group == 0 ? of : 0.f;
        sums[spot(OWN + j, e)] = at.group == 0 ? 0.f : of;
      }
#pragma unroll
      for (int i = 0; i < 5; i++) kept[j][i] = next[j][i];
    }
    add_over_lanes(over_rows, at.g, bias);
    P::run(a, row, row8, b, sums);
    exchange.run(sums, at.group, t == 0, dh);
  }
  const int part = lane0 + at.warp * 2 + (OWN == 1 ? at.group : 0);  // with 16 units, both warpgroups have the same ones
  *reinterpret_cast<float2*>(d_bias + (size_t)part * 4 * H + at.g / 2 * H + unit + at.unit(0) + at.g % 2 * 2) = bias;
#pragma unroll
  for (int j = 0; j < OWN; j++)
    *reinterpret_cast<float4*>(d_first + (lane + at.row(j)) * H + unit + at.unit(j)) =
        make_float4(dh[0][j][0], dh[0][j][1], dh[0][j][2], dh[0][j][3]);
  exchange.finish();
}
