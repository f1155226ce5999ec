// The softmax of the output layer on NVIDIA GPUs: the loss of each row of logits, and its gradient in their place.
// loss_cuda.py calls it. LOGIT is u16 (bf16) or float; sums are fp32.
typedef unsigned int u32;
typedef unsigned short u16;
constexpr int EIGHT = 8;             // columns that a thread reads at once
constexpr float LOWEST = -1e30f;     // below every logit; finite, so that differences of two are no NaN

struct Values { float v[EIGHT]; };

__device__ __forceinline__ void load(Values& values, const u16* from) {
  uint4 words = *reinterpret_cast<const uint4*>(from);
  const u32 word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
  for (int i = 0; i < 4; i++)
    values.v[2 * i] = __uint_as_float(word[i] << 16), values.v[2 * i + 1] = __uint_as_float(word[i] & 0xFFFF0000u);
}
__device__ __forceinline__ void load(Values& values, const float* from) {
#pragma unroll
  for (int i = 0; i < 2; i++) {
    float4 four = reinterpret_cast<const float4*>(from)[i];
    values.v[4 * i] = four.x, values.v[4 * i + 1] = four.y, values.v[4 * i + 2] = four.z, values.v[4 * i + 3] = four.w;
  }
}
__device__ __forceinline__ void store(const Values& values, u16* to) {
  u32 word[4];
#pragma unroll
  for (int i = 0; i < 4; i++)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word[i]) : "f"(values.v[2 * i + 1]), "f"(values.v[2 * i]));
  *reinterpret_cast<uint4*>(to) = make_uint4(word[0], word[1], word[2], word[3]);
}
__device__ __forceinline__ void store(const Values& values, float* to) {
#pragma unroll
  for (int i = 0; i < 2; i++)
    reinterpret_cast<float4*>(to)[i] =
        make_float4(values.v[4 * i], values.v[4 * i + 1], values.v[4 * i + 2], values.v[4 * i + 3]);
}
__device__ __forceinline__ float one(const u16* from) { return __uint_as_float((u32)*from << 16); }
__device__ __forceinline__ float one(const float* from) { return *from; }

// The sum of exp(x - most) over two sets of x.
__device__ __forceinline__ void merge(float& most, float& sum, float other_most, float other_sum) {
  float next = fmaxf(most, other_most);
  sum = sum * __expf(most - next) + other_sum * __expf(other_most - next);
  most = next;
}

// logits [rows, columns], columns a multiple of 8; bias [columns], LOWEST where there is no token; targets [rows];
// weights [rows] or null; losses [rows]. One block for each row.
extern "C" __global__ void __launch_bounds__(THREADS) softmax(LOGIT* logits, const float* __restrict__ bias,
    const long long* __restrict__ targets, const float* __restrict__ weights, float* losses, int columns, int differentiate) {
  __shared__ float mosts[THREADS / 32], sums[THREADS / 32];
  LOGIT* row = logits + (size_t)blockIdx.x * columns;
  float most = LOWEST, sum = 0.f;
  for (int column = threadIdx.x * EIGHT; column < columns; column += THREADS * EIGHT) {
    Values x, b;
    load(x, row + column), load(b, bias + column);
    float next = most;
#pragma unroll
    for (int i = 0; i < EIGHT; i++) x.v[i] += b.v[i], next = fmaxf(next, x.v[i]);
    sum *= __expf(most - next);
#pragma unroll
    for (int i = 0; i < EIGHT; i++) sum += __expf(x.v[i] - next);
    most = next;
  }
#pragma unroll
  for (int distance = 16; distance; distance /= 2)
    merge(most, sum, __shfl_xor_sync(0xFFFFFFFFu, most, distance), __shfl_xor_sync(0xFFFFFFFFu, sum, distance));
  if (threadIdx.x % 32 == 0) mosts[threadIdx.x / 32] = most, sums[threadIdx.x / 32] = sum;
  const int target = (int)targets[blockIdx.x];
  const float weight = weights ? weights[blockIdx.x] : 1.f, chosen = one(row + target) + bias[target];
  __syncthreads();
  most = mosts[0], sum = sums[0];
#pragma unroll
  for (int warp = 1; warp < THREADS / 32; warp++) merge(most, sum, mosts[warp], sums[warp]);
  const float total = most + __logf(sum);
  if (threadIdx.x == 0) losses[blockIdx.x] = weight * (total - chosen);
  if (!differentiate) return;
  for (int column = threadIdx.x * EIGHT; column < columns; column += THREADS * EIGHT) {
    Values x, b;
    load(x, row + column), load(b, bias + column);
#pragma unroll
    for (int i = 0; i < EIGHT; i++) {
      x.v[i] = weight * __expf(x.v[i] + b.v[i] - total);
      if (column + i == target) x.v[i] -= weight;
    }
    store(x, row + column);
  }
}
