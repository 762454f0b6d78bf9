// Window attention of windows of 12 x 12 tokens and heads of 32 channels, all of it in registers.
//
// out = softmax(scale q k^T) v within a window: qkv [B, H, W, 3C], channels contiguous -> out [B, H, W, C] contiguous.
// `scale` includes log2(e). Tokens beyond the map have the bias as their projections (compiled with PADDED 1).
// Grid: heads, windows, batch. A block is one head of one window: nine warps of 16 queries, which share nothing; at least
// BLOCKS of them fit on a multiprocessor.
//
// Fragments of mma.m16n8k16 (PTX ISA): lane l is in group g = l / 4 at place t = l % 4. It holds rows g and g + 8 and
// columns 2t, 2t + 1, 2t + 8, 2t + 9 of A; the same rows k and column g of B; rows g, g + 8 and columns 2t, 2t + 1 of C.
// Sums do not depend on the order of k, so k is numbered to suit the memory:
//     q k^T   k = 2t, 2t + 1, 2t + 8, 2t + 9 of step s are the channels 8t + 4s .. 8t + 4s + 3: one load of 16 bytes
//     p v     the probabilities of two tiles of C are a fragment of A; column n of tile c is channel 4n + c, so a lane
//             loads 4 channels of each key, and stores 8 neighbouring channels of the result

#ifndef EMULATED
typedef unsigned short u16;
typedef unsigned int u32;

#ifdef HALF
#define ELEMENT "f16"
#else
#define ELEMENT "bf16"
#endif

// c [16, 8] += a [16, 16] b [16, 8], summed in float32
static __device__ __forceinline__ void mma(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32." ELEMENT "." ELEMENT ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// round two values to the element's type: the first is the lower half
static __device__ __forceinline__ u32 pack(float low, float high) {
    u32 both;
    asm("cvt.rn." ELEMENT "x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}

static __device__ __forceinline__ float power_of_two(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

static __device__ __forceinline__ float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

static __device__ __forceinline__ float exchange(float x, int distance) {
    return __shfl_xor_sync(0xffffffff, x, distance);
}

static __device__ __forceinline__ void prefetch(const void* x) { asm volatile("prefetch.global.L2 [%0];" ::"l"(x)); }

// bytes of the eight in (low, high), one for each hexadecimal digit of `order`
static __device__ __forceinline__ u32 bytes(u32 low, u32 high, u32 order) { return __byte_perm(low, high, order); }
#endif

#define WINDOW 12
#define KEYS (WINDOW * WINDOW)
#define HEAD_DIM 32
#define BLOCK 48  // keys whose scores are held at once

// Bytes from the window's first token to another. Unsigned 32-bit offsets from one pointer spare registers.
static __device__ __forceinline__ u32 offset(u32 token, u32 stride_h, u32 stride_w) {
    return 2 * (token / WINDOW * stride_h + token % WINDOW * stride_w);
}

extern "C" __global__ void __launch_bounds__(2 * KEYS, BLOCKS)
forward(const u16* qkv, const u16* bias, u16* out, int height, int width, int C, long long stride_b, u32 stride_h,
        u32 stride_w, float scale) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const int across = (width + WINDOW - 1) / WINDOW;
    const int top = blockIdx.y / across * WINDOW, left = blockIdx.y % across * WINDOW;
    const int channel = blockIdx.x * HEAD_DIM;
    const char* rows =
        (const char*)(qkv + blockIdx.z * stride_b + (long long)top * stride_h + (long long)left * stride_w + channel);
#if PADDED
#define LOAD(type, token, at, within)                                                                                 \
    (*(const type*)((top + (token) / WINDOW < height && left + (token) % WINDOW < width ? rows + (at) : outside) +    \
                    (within)))
    const char* outside = (const char*)(bias + channel);
#else
#define LOAD(type, token, at, within) (*(const type*)(rows + ((at) + (within))))
#endif

    // Each thread asks for the keys or the values of one token, so that all are on their way at once.
    prefetch(&LOAD(u32, threadIdx.x % KEYS, offset(threadIdx.x % KEYS, stride_h, stride_w),
                   2 * C * (1 + threadIdx.x / KEYS)));

    const int first = threadIdx.x / 32 * 16 + g, second = first + 8;  // this lane's queries
    const uint4 q0 = LOAD(uint4, first, offset(first, stride_h, stride_w), 16 * t);
    const uint4 q1 = LOAD(uint4, second, offset(second, stride_h, stride_w), 16 * t);

    // Three tiles of 8 keys are two rows of the window, so three offsets give those of all tiles.
    u32 k_at[3], v_at[3];
#pragma unroll
    for (int i = 0; i < 3; i++) {
        k_at[i] = offset(8 * i + g, stride_h, stride_w);
        v_at[i] = offset(8 * i + 2 * t, stride_h, stride_w);
    }
    const u32 k_channel = 2 * C + 16 * t, v_channel = 4 * C + 8 * g, two_rows = 4 * stride_h;
    float result[4][4] = {};
    float row_max[2] = {-3.4e38f, -3.4e38f}, row_sum[2] = {};
    for (int start = 0; start < KEYS; start += BLOCK, rows += BLOCK / WINDOW * 2 * stride_h) {
        float scores[BLOCK / 8][4] = {};
#pragma unroll
        for (int i = 0; i < BLOCK / 8; i++) {
            const u32 at = k_at[i % 3] + i / 3 * two_rows;
            const uint4 k = LOAD(uint4, start + 8 * i + g, at, k_channel);
            mma(scores[i], q0.x, q1.x, q0.y, q1.y, k.x, k.y);
            mma(scores[i], q0.z, q1.z, q0.w, q1.w, k.z, k.w);
        }

        // The four lanes of a group hold the scores of queries `first` (half 0) and `second` (half 1).
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float m = scores[0][2 * half];
#pragma unroll
            for (int i = 0; i < BLOCK / 8; i++) m = fmaxf(m, fmaxf(scores[i][2 * half], scores[i][2 * half + 1]));
            m = fmaxf(m, exchange(m, 1));
            m = fmaxf(row_max[half], fmaxf(m, exchange(m, 2)) * scale);
            const float alpha = power_of_two(row_max[half] - m);
            row_max[half] = m;
            row_sum[half] *= alpha;
#pragma unroll
            for (int c = 0; c < 4; c++) {
                result[c][2 * half] *= alpha;
                result[c][2 * half + 1] *= alpha;
            }
        }

#pragma unroll
        for (int i = 0; i < BLOCK / 8; i += 2) {
            u32 p[4];
#pragma unroll
            for (int part = 0; part < 4; part++) {
                const float* pair = scores[i + part / 2] + part % 2 * 2;
                const float low = power_of_two(pair[0] * scale - row_max[part % 2]);
                const float high = power_of_two(pair[1] * scale - row_max[part % 2]);
                row_sum[part % 2] += low + high;
                p[part] = pack(low, high);
            }
            // values of keys 2t and 2t + 1 of tiles i and i + 1; both keys lie in one row of the window
            u32 v[2][4];
#pragma unroll
            for (int tile = 0; tile < 2; tile++) {
                const u32 at = v_at[(i + tile) % 3] + (i + tile) / 3 * two_rows;
                const uint2 low = LOAD(uint2, start + 8 * (i + tile) + 2 * t, at, v_channel);
                const uint2 high = LOAD(uint2, start + 8 * (i + tile) + 2 * t + 1, at + 2 * stride_w, v_channel);
                v[tile][0] = bytes(low.x, high.x, 0x5410);
                v[tile][1] = bytes(low.x, high.x, 0x7632);
                v[tile][2] = bytes(low.y, high.y, 0x5410);
                v[tile][3] = bytes(low.y, high.y, 0x7632);
            }
#pragma unroll
            for (int c = 0; c < 4; c++) mma(result[c], p[0], p[1], p[2], p[3], v[0][c], v[1][c]);
        }
    }

#pragma unroll
    for (int half = 0; half < 2; half++) {
        float sum = row_sum[half];
        sum += exchange(sum, 1);
        sum += exchange(sum, 2);
        const float factor = reciprocal(sum);
        const int query = half ? second : first;
        const int y = top + query / WINDOW, x = left + query % WINDOW;
        uint4 o;
        o.x = pack(result[0][2 * half] * factor, result[1][2 * half] * factor);
        o.y = pack(result[2][2 * half] * factor, result[3][2 * half] * factor);
        o.z = pack(result[0][2 * half + 1] * factor, result[1][2 * half + 1] * factor);
        o.w = pack(result[2][2 * half + 1] * factor, result[3][2 * half + 1] * factor);
#if PADDED
        if (y >= height || x >= width) continue;
#endif
        const long long pixel = ((long long)blockIdx.z * height + y) * width + x;
        *(uint4*)(out + pixel * C + channel + 8 * t) = o;
    }
}
