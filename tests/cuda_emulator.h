// Runs this project's CUDA kernels on a CPU, for tests: the names of engine/kernels/cuda/primitives.cuh over fibers.
// A cluster of thread blocks is a set of fibers that take turns; barriers and warp operations are where they give way.
// Clusters (of one block, if a kernel is not compiled for more) run one after another, in a shuffled order. Float sums
// inside a tensor-core step are made in float64 and rounded once, so values are close to a GPU's, not equal to them;
// what may be compared for equality is one emulated run with another.
#include <setjmp.h>
#include <ucontext.h>
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <vector>

typedef unsigned char u8;
typedef signed char i8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
struct uint2 { u32 x, y; };
struct alignas(16) uint4 { u32 x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct Index3 { u32 x, y, z; };
static uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
static float2 make_float2(float x, float y) { return {x, y}; }
static float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace emulator {
constexpr size_t STACK_BYTES = 256 * 1024;

struct Fiber {  // lives on from block to block; turns are taken by jumps, which ask nothing of the kernel
    jmp_buf place;
    std::unique_ptr<u8[]> stack;
    Index3 thread;
    int block, warp;  // among those of the cluster
    int waits_for;  // the generation of the cluster's barrier that it has arrived in
    bool done, started;
};
struct Warp {
    int arrived = 0, generation = 0, alive = 32;
    u64 exchange[32][16];
};
struct Barrier {
    int arrived = 0, generation = 0;
};
struct Block {
    Index3 index;
    int alive;
    Barrier all, named[16];
    std::vector<u8> shared;
};
static std::vector<Fiber> fibers;
static std::vector<Warp> warps;
static std::vector<Block> blocks;
static Barrier cluster;
static jmp_buf scheduler;
static int current, alive, cluster_threads;
static Index3 grid_size, block_size;
static std::function<void()> body;

inline void give_way() {
    if (!_setjmp(fibers[current].place)) _longjmp(scheduler, 1);
}
inline Fiber& self() { return fibers[current]; }
inline Warp& own_warp() { return warps[self().warp]; }
inline Block& own_block() { return blocks[self().block]; }
inline void open_if_full(Barrier& barrier, int count) {
    if (count > 0 && barrier.arrived >= count) { barrier.arrived = 0; ++barrier.generation; }
}

inline void leave() {
    Warp& warp = own_warp();
    self().done = true;
    --alive;
    --warp.alive;
    open_if_full(own_block().all, --own_block().alive);
    if (self().waits_for != cluster.generation) ++cluster.arrived;  // who ends without having arrived is not waited for
    open_if_full(cluster, cluster_threads);
    if (warp.alive > 0 && warp.arrived >= warp.alive) { warp.arrived = 0; ++warp.generation; }
}
inline void entry() {
    while (true) {
        body();
        leave();
        give_way();
    }
}
inline void take_turn(Fiber& fiber) {
    if (_setjmp(scheduler)) return;
    if (fiber.started) _longjmp(fiber.place, 1);
    static ucontext_t first, here;
    fiber.started = true;
    fiber.stack.reset(new u8[STACK_BYTES]);  // not filled: most of its pages are never touched
    getcontext(&first);
    first.uc_stack.ss_sp = fiber.stack.get();
    first.uc_stack.ss_size = STACK_BYTES;
    makecontext(&first, entry, 0);
    swapcontext(&here, &first);
}

inline void meet(Barrier& barrier, int count) {
    int generation = barrier.generation;
    ++barrier.arrived;
    open_if_full(barrier, count);
    while (generation == barrier.generation) give_way();
}
inline void block_barrier() { meet(own_block().all, own_block().alive); }
inline void warp_barrier() {
    Warp& warp = own_warp();
    int generation = warp.generation;
    if (++warp.arrived >= warp.alive) { warp.arrived = 0; ++warp.generation; }
    while (generation == warp.generation) give_way();
}

template <typename T> T exchanged(T value, int from) {
    int lane = self().thread.x % 32;
    Warp& warp = own_warp();
    memcpy(warp.exchange[lane], &value, sizeof(T));
    warp_barrier();
    T result;
    memcpy(&result, warp.exchange[from & 31], sizeof(T));
    warp_barrier();
    return result;
}

inline void run_cluster(const Index3* indices, int count, int threads, size_t shared_bytes) {
    if ((int)fibers.size() < count * threads) fibers.resize(count * threads);
    const int block_warps = (threads + 31) / 32;
    warps.assign(count * block_warps, Warp());
    blocks.assign(count, Block());
    alive = cluster_threads = count * threads;
    cluster = Barrier();
    for (int b = 0; b < count; ++b) {
        blocks[b].index = indices[b];
        blocks[b].alive = threads;
        blocks[b].shared.assign(shared_bytes + 2048, 0xcd);
        for (int i = 0; i < threads; ++i) {
            Fiber& fiber = fibers[b * threads + i];
            fiber.thread = {(u32)i, 0, 0};
            fiber.block = b;
            fiber.warp = b * block_warps + i / 32;
            fiber.done = false;
            fiber.waits_for = -1;
        }
    }
    while (alive > 0)
        for (int i = 0; i < count * threads; ++i)
            if (!fibers[i].done) { current = i; take_turn(fibers[i]); }
}

inline void launch(Index3 grid, int threads, size_t shared_bytes, int cluster_size, std::function<void()> kernel) {
    body = kernel;
    grid_size = grid;
    block_size = {(u32)threads, 1, 1};
    if (grid.x % cluster_size) { fprintf(stderr, "a grid of %u in clusters of %d\n", grid.x, cluster_size); abort(); }
    std::vector<std::vector<Index3>> clusters;
    for (u32 z = 0; z < grid.z; ++z)
        for (u32 y = 0; y < grid.y; ++y)
            for (u32 x = 0; x < grid.x; ++x) {
                if (x % cluster_size == 0) clusters.emplace_back();
                clusters.back().push_back({x, y, z});
            }
    std::shuffle(clusters.begin(), clusters.end(), std::mt19937(grid.x + grid.y));
    for (auto& indices : clusters) run_cluster(indices.data(), cluster_size, threads, shared_bytes);
}
inline u8* align1024(u8* shared) { return (u8*)(((uintptr_t)shared + 1023) & ~(uintptr_t)1023); }
inline u8* aligned_shared(Block& block) { return align1024(block.shared.data()); }  // offsets agree in a cluster
}  // namespace emulator
using emulator::align1024;

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#ifndef CLUSTER
#define CLUSTER 1
#endif
#define SHARED static
#define DYNAMIC_SHARED(name) u8* name = emulator::aligned_shared(emulator::own_block())
#define threadIdx (emulator::self().thread)
#define blockIdx (emulator::own_block().index)
#define gridDim (emulator::grid_size)
#define blockDim (emulator::block_size)
inline void __syncthreads() { emulator::block_barrier(); }
inline void barrier(int id, int threads) { emulator::meet(emulator::own_block().named[id], threads); }
inline void cluster_barrier() { emulator::meet(emulator::cluster, emulator::cluster_threads); }
inline void store_peer16(float4* mine, int rank, float4 v) {
    u8 *own = emulator::aligned_shared(emulator::own_block()), *peer = emulator::aligned_shared(emulator::blocks[rank]);
    *(float4*)(peer + ((u8*)mine - own)) = v;
}
inline void barrier_arrive(int id, int threads) {
    ++emulator::own_block().named[id].arrived;
    emulator::open_if_full(emulator::own_block().named[id], threads);
}
inline void cluster_arrive() {
    emulator::self().waits_for = emulator::cluster.generation;
    ++emulator::cluster.arrived;
    emulator::open_if_full(emulator::cluster, emulator::cluster_threads);
}
inline void cluster_wait() { while (emulator::self().waits_for == emulator::cluster.generation) emulator::give_way(); }
inline void make_mailbox(void* mailbox, int bytes) { *(u64*)mailbox = bytes; }
inline void await_mailbox(void* mailbox) {
    for (int turns = 0; *(volatile u64*)mailbox; ++turns) {
        if (turns > 100000) { fprintf(stderr, "a mailbox lacks %lld bytes\n", *(long long*)mailbox); abort(); }
        emulator::give_way();
    }
}
struct Gate {  // what a gate's eight bytes hold
    u16 arrivals, missing;
    u32 openings;
};
inline void make_gate(u64* gate, int arrivals) { *(Gate*)gate = {(u16)arrivals, (u16)arrivals, 0}; }
inline void pass_gate(u64* at) {
    Gate* gate = (Gate*)at;
    if (--gate->missing == 0) { gate->missing = gate->arrivals; ++gate->openings; }
}
inline void await_gate(u64* at, int parity) {
    const volatile Gate* gate = (const volatile Gate*)at;
    for (int turns = 0; (int)(gate->openings % 2) == parity; ++turns) {
        if (turns > 1000000) { fprintf(stderr, "a gate lacks %d arrivals\n", (int)gate->missing); abort(); }
        emulator::give_way();
    }
}
typedef u8* PeerAddress;
inline PeerAddress peer_address(const void* mine, int rank) {
    u8 *own = emulator::aligned_shared(emulator::own_block()), *peer = emulator::aligned_shared(emulator::blocks[rank]);
    return peer + ((const u8*)mine - own);
}
inline void send8(PeerAddress to, PeerAddress mailbox, float2 v) {
    *(float2*)to = v;
    *(u64*)mailbox -= 8;
}
inline void __syncwarp(u32 = ~0u) { emulator::warp_barrier(); }
inline void __threadfence() {}
template <typename T> T __ldcg(const T* p) { return *p; }
inline u32 atomicAdd(u32* p, u32 v) { u32 old = *p; *p += v; return old; }
inline u64 atomicAdd(u64* p, u64 v) { u64 old = *p; *p += v; return old; }
inline int __float2int_rn(float x) { return (int)std::max(-2147483648.0, std::min(2147483647.0, (double)rintf(x))); }
template <typename T> T __shfl_xor_sync(u32, T v, int mask) { return emulator::exchanged(v, (threadIdx.x % 32) ^ mask); }
template <typename T> T __shfl_sync(u32, T v, int lane) { return emulator::exchanged(v, lane); }
inline int __popc(u32 v) { return __builtin_popcount(v); }
inline u32 __ballot_sync(u32, bool v) {
    u32 result = 0;
    for (int i = 0; i < 32; ++i) result |= (u32)emulator::exchanged((int)v, i) << i;
    return result;
}
inline int __ffs(u32 v) { return __builtin_ffs(v); }
inline float __uint_as_float(u32 v) { float f; memcpy(&f, &v, 4); return f; }
inline u32 __float_as_uint(float f) { u32 v; memcpy(&v, &f, 4); return v; }
inline float __expf(float x) { return expf(x); }
inline float exp2_fast(float x) { return exp2f(x); }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float divide_fast(float x, float y) { return x / y; }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
using std::max;
using std::min;

#ifndef BF16
#define BF16 1
#endif
inline float to_float(u16 bits) {
#if BF16
    return __uint_as_float((u32)bits << 16);
#else
    _Float16 h; memcpy(&h, &bits, 2); return (float)h;
#endif
}
inline u16 from_float(float value) {
#if BF16
    u32 bits = __float_as_uint(value);
    return (u16)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
#else
    _Float16 h = (_Float16)value; u16 bits; memcpy(&bits, &h, 2); return bits;
#endif
}
inline u32 pack2(float low, float high) { return (u32)from_float(low) | ((u32)from_float(high) << 16); }

inline u32 byte_permute(u32 low, u32 high, u32 selector) {
    u64 bytes = low | ((u64)high << 32);
    u32 result = 0;
    for (int i = 0; i < 4; ++i) {
        u32 nibble = (selector >> (4 * i)) & 15, byte = (u32)(bytes >> (8 * (nibble & 7))) & 255;
        if (nibble & 8) byte = byte & 128 ? 255 : 0;
        result |= byte << (8 * i);
    }
    return result;
}
inline u32 and_or(u32 value, u32 mask, u32 bits) { return (value & mask) | bits; }
template <int PICK> u32 widen_int8(u32 codes) {
    return pack2((float)(i8)(codes >> (8 * PICK)), (float)(i8)(codes >> (8 * PICK + 8)));
}
template <typename T> T* kept(T* pointer) { return pointer; }
inline uint4 load_once16(const void* p) { return *(const uint4*)p; }
inline float2 load_once8(const void* p) { return *(const float2*)p; }
template <typename T> T* known_after(u32, T* pointer) { return pointer; }
inline uint4 load_early16(const void* p) { return *(const uint4*)p; }
inline const u16* known_early(const u16* p) { return p; }
inline void copy16_async(void* shared, const void* global) { memcpy(shared, global, 16); }
inline void copy16_or_zero(void* shared, const void* global, bool copies) {
    if (copies) memcpy(shared, global, 16);
    else memset(shared, 0, 16);
}
inline void commit_copies() {}
template <int> void wait_copies() {}
inline void prefetch_l2(const void* p, int bytes) {  // reads its first and last byte, so that a sanitizer sees them
    volatile u8 seen = ((const u8*)p)[0];
    seen = ((const u8*)p)[bytes - 1];
}
inline void let_next_kernel_start() {}
inline void wait_for_previous_kernel() {}

inline u32 warp_max_bits(u32 value) {
    for (int step = 16; step > 0; step /= 2) value = std::max(value, __shfl_xor_sync(~0u, value, step));
    return value;
}

inline void multiply16x8x16(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    emulator::Warp& warp = emulator::own_warp();
    int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
    u32 mine[6] = {a0, a1, a2, a3, b0, b1};
    float* values = (float*)warp.exchange[lane];  // once a lane, not once a product
    for (int i = 0; i < 6; ++i) {
        values[2 * i] = to_float((u16)mine[i]);
        values[2 * i + 1] = to_float((u16)(mine[i] >> 16));
    }
    emulator::warp_barrier();
    auto half = [&](int from, int reg, int upper) { return (double)((float*)warp.exchange[from])[2 * reg + upper]; };
    for (int i = 0; i < 4; ++i) {
        int row = i / 2, column = 2 * q + i % 2;
        double sum = c[i];
        for (int k = 0; k < 16; ++k) {
            int kq = (k % 8) / 2, high = k / 8;
            sum += half(g * 4 + kq, row + 2 * high, k & 1) * half(column * 4 + kq, 4 + high, k & 1);
        }
        c[i] = (float)sum;
    }
    emulator::warp_barrier();
}

inline void multiply16x8x32(int (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    emulator::Warp& warp = emulator::own_warp();
    int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
    u32 mine[6] = {a0, a1, a2, a3, b0, b1};
    memcpy(warp.exchange[lane], mine, sizeof(mine));
    emulator::warp_barrier();
    auto codes = [&](int from, int reg) { return (const i8*)warp.exchange[from] + 4 * reg; };
    for (int i = 0; i < 4; ++i)
        for (int high = 0; high < 2; ++high)
            for (int kq = 0; kq < 4; ++kq) {
                const i8 *a = codes(g * 4 + kq, i / 2 + 2 * high), *b = codes((2 * q + i % 2) * 4 + kq, 4 + high);
                for (int k = 0; k < 4; ++k) c[i] += a[k] * b[k];
            }
    emulator::warp_barrier();
}

inline uint4 load_matrices(const void* row) {
    u64 address = (u64)row;
    int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
    u32 v[4];
    for (int i = 0; i < 4; ++i) {
        u64 from = emulator::exchanged(address, 8 * i + g);
        memcpy(v + i, (const u8*)from + 4 * q, 4);
    }
    return {v[0], v[1], v[2], v[3]};
}

inline uint4 load_matrices_transposed(const void* row) {
    u64 address = (u64)row;
    int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
    u32 v[4];
    for (int i = 0; i < 4; ++i) {
        const u16* rows[2];
        for (int j = 0; j < 2; ++j) rows[j] = (const u16*)emulator::exchanged(address, 8 * i + 2 * q + j);
        v[i] = rows[0][g] | ((u32)rows[1][g] << 16);
    }
    return {v[0], v[1], v[2], v[3]};
}

typedef const u8* SharedAddress;
inline SharedAddress shared_address(const void* p) { return (const u8*)p; }
inline u32 load_shared4(SharedAddress p) { u32 v; memcpy(&v, p, 4); return v; }
typedef const u8* Operand;
inline Operand operand_at(const u8* tile) { return tile; }
inline Operand operand_after(Operand tile, int bytes) { return tile + bytes; }
inline int operand_offset(int row, int piece) { return row * 128 + ((piece ^ (row & 7)) << 4); }
inline void publish_to_tensor_cores() {}
inline void products_begin() {}
template <int> void give_registers() {}
template <int> void take_registers() {}
inline void products_commit() {}
template <int PENDING, int TILES> void products_wait(float (&)[TILES][4], u32 (&)[4][4]) {}
template <int TILES>
void multiply64(float (&c)[TILES][4], u32 a0, u32 a1, u32 a2, u32 a3, Operand tile, int step, int keep) {
    int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
    for (int t = 0; t < TILES; ++t) {
        if (!keep) c[t][0] = c[t][1] = c[t][2] = c[t][3] = 0.0f;
        u32 b0, b1;  // columns 2q and 2q + 1 of the step, and the same eight further, of token 8 * t + g
        memcpy(&b0, tile + operand_offset(8 * t + g, 2 * step) + 4 * q, 4);
        memcpy(&b1, tile + operand_offset(8 * t + g, 2 * step + 1) + 4 * q, 4);
        multiply16x8x16(c[t], a0, a1, a2, a3, b0, b1);
    }
}
