// Run a kernel of kernels/cuda on the host: its warp-wide instructions are emulated, everything else is the kernel's own
// code. Compiled with KERNEL, the path of the .cu file, and with the macros of the kernel.
//
// The 32 lanes of a warp are coroutines that take turns, so each has written its operands when one reads the others'.
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

typedef uint16_t u16;
typedef uint32_t u32;
struct uint2 { u32 x, y; };
struct uint4 { u32 x, y, z, w; };
struct dim { u32 x, y, z; };
#define EMULATED
#define __global__
#define __device__
#define __forceinline__
#define __launch_bounds__(...)

static const int LANES = 32;
static dim threadIdx, blockIdx;
static int lane;
static ucontext_t scheduler, lanes[LANES];

static void wait() { swapcontext(&lanes[lane], &scheduler); }

// float and the 16-bit type of the kernel, rounding to the nearest even number
static float widen(u16 bits) {
    float value;
#ifdef HALF
    _Float16 half;
    memcpy(&half, &bits, 2);
    value = half;
#else
    const u32 wide = (u32)bits << 16;
    memcpy(&value, &wide, 4);
#endif
    return value;
}

static u16 narrow(float value) {
#ifdef HALF
    const _Float16 half = (_Float16)value;
    u16 bits;
    memcpy(&bits, &half, 2);
    return bits;
#else
    u32 wide;
    memcpy(&wide, &value, 4);
    if (std::isnan(value)) return 0x7fff;
    return (wide + 0x7fff + (wide >> 16 & 1)) >> 16;
#endif
}

static u32 pack(float low, float high) { return narrow(low) | (u32)narrow(high) << 16; }
static float power_of_two(float x) { return std::exp2(x); }
static float reciprocal(float x) { return 1 / x; }

static void prefetch(const u32* x) {
    volatile u32 touched = *x;  // memory that exists
    (void)touched;
}

static u32 bytes(u32 low, u32 high, u32 order) {
    const uint64_t all = low | (uint64_t)high << 32;
    u32 result = 0;
    for (int i = 0; i < 4; i++) result |= (u32)(all >> 8 * (order >> 4 * i & 7) & 255) << 8 * i;
    return result;
}

static float exchanged[LANES];

static float exchange(float x, int distance) {
    exchanged[lane] = x;
    wait();
    const float other = exchanged[lane ^ distance];
    wait();
    return other;
}

// PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type"
static float A[16][16], B[16][8];

static void mma(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    const int group = lane / 4, place = lane % 4 * 2;
    const u32 a[4] = {a0, a1, a2, a3}, b[2] = {b0, b1};
    for (int i = 0; i < 8; i++) A[group + i / 2 % 2 * 8][place + i % 2 + i / 4 * 8] = widen(a[i / 2] >> 16 * (i % 2));
    for (int i = 0; i < 4; i++) B[place + i % 2 + i / 2 * 8][group] = widen(b[i / 2] >> 16 * (i % 2));
    wait();
    for (int i = 0; i < 4; i++)
        for (int k = 0; k < 16; k++) c[i] += A[group + i / 2 * 8][k] * B[k][place + i % 2];
    wait();
}

#include KERNEL

struct Arguments {
    const u16 *qkv, *bias;
    u16* out;
    int height, width, C;
    long long stride_b;
    u32 stride_h, stride_w;
    float scale;
};
static Arguments given;
static bool done[LANES];

static void run_lane() {
    const Arguments& a = given;
    forward(a.qkv, a.bias, a.out, a.height, a.width, a.C, a.stride_b, a.stride_h, a.stride_w, a.scale);
    done[lane] = true;
    wait();
}

extern "C" void launch(const Arguments* arguments, int x, int y, int z, int threads) {
    given = *arguments;
    std::vector<std::vector<char>> stacks(LANES, std::vector<char>(1 << 16));
    for (blockIdx.z = 0; (int)blockIdx.z < z; blockIdx.z++)
        for (blockIdx.y = 0; (int)blockIdx.y < y; blockIdx.y++)
            for (blockIdx.x = 0; (int)blockIdx.x < x; blockIdx.x++)
                for (int first = 0; first < threads; first += LANES) {
                    for (int i = 0; i < LANES; i++) {
                        getcontext(&lanes[i]);
                        lanes[i].uc_stack = {stacks[i].data(), 0, stacks[i].size()};
                        lanes[i].uc_link = nullptr;
                        done[i] = false;
                        makecontext(&lanes[i], run_lane, 0);
                    }
                    while (!std::all_of(done, done + LANES, [](bool x) { return x; }))
                        for (lane = 0; lane < LANES; lane++)
                            if (!done[lane]) {
                                threadIdx.x = first + lane;
                                swapcontext(&scheduler, &lanes[lane]);
                            }
                }
}
