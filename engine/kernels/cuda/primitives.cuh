// What every kernel here builds on: 16-bit activations, fragments of the tensor cores, asynchronous copies.
// No CUDA header is included, so that the run-time compiler needs none on the user's machine. A kernel source never
// writes PTX itself: a host-side emulator supplies these same names in the tests.

typedef unsigned char u8;
typedef signed char i8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#ifndef BF16
#define BF16 1
#endif

#define DYNAMIC_SHARED(name) extern __shared__ __align__(16) u8 name[]
#define SHARED __shared__

// ---- 16-bit activations: bfloat16 with BF16=1 (compute capability 8.0 and up), else float16 ----

__device__ __forceinline__ float to_float(u16 bits) {
#if BF16
    return __uint_as_float((u32)bits << 16);
#else
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
#endif
}

__device__ __forceinline__ u16 from_float(float value) {
    u16 bits;
#if BF16
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
#else
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
#endif
    return bits;
}

__device__ __forceinline__ u32 pack2(float low, float high) {
    return (u32)from_float(low) | ((u32)from_float(high) << 16);
}

// ---- bytes ----

// Four bytes chosen from the eight of (low, high) by the selector's nibbles. A nibble with bit 3 set gives the sign of
// the chosen byte, repeated: 0x00 or 0xff.
__device__ __forceinline__ u32 byte_permute(u32 low, u32 high, u32 selector) {
    u32 result;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(low), "r"(high), "r"(selector));
    return result;
}

__device__ __forceinline__ u32 and_or(u32 value, u32 mask, u32 bits) {  // one instruction, which nvrtc does not find
    u32 result;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(result) : "r"(value), "r"(mask), "r"(bits));
    return result;
}

// Four int8 codes -> the two at bytes PICK, PICK + 1 as exact activations.
template <int PICK>
__device__ __forceinline__ u32 widen_int8(u32 codes) {
    u32 result;
#if BF16
    // 0x43 over a byte is 128 + its low seven bits while the top bit is clear; a set one (a negative code) stands for
    // -128: (128 + low seven bits) - (negative ? 256 : 128), where 0x4380 is 256.
    u32 lanes = byte_permute(codes, 0x43434343u, PICK == 0 ? 0x4140 : 0x4342);
    u32 low = lanes & 0xff7fff7fu, shift = lanes & 0xff80ff80u;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(shift), "r"(0xbf80bf80u), "r"(low));
#else
    // 0x64 over a byte is 1024 + the byte.
    u32 lanes = byte_permute(codes ^ 0x80808080u, 0x64646464u, PICK == 0 ? 0x4140 : 0x4342);
    asm("sub.f16x2 %0, %1, %2;" : "=r"(result) : "r"(lanes), "r"(0x64806480u));
#endif
    return result;
}

#ifndef INFINITY
#define INFINITY __uint_as_float(0x7f800000u)
#endif

__device__ __forceinline__ float exp2_fast(float x) {
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}

__device__ __forceinline__ float divide_fast(float x, float y) {  // within 2 units of the last place; 0 for y > 2^126
    float result;
    asm("div.approx.ftz.f32 %0, %1, %2;" : "=f"(result) : "f"(x), "f"(y));
    return result;
}

// ---- memory ----

// A pointer as it is: the compiler would rather make it anew from its parts each time.
template <typename T> __device__ __forceinline__ T* kept(T* pointer) {
    asm("" : "+l"(pointer));
    return pointer;
}

__device__ __forceinline__ uint4 load_once16(const void* address) {  // weights: read by one thread, once
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(address));
    return v;
}

__device__ __forceinline__ float2 load_once8(const void* address) {
    float2 v;
    asm volatile("ld.global.nc.L1::no_allocate.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "l"(address));
    return v;
}

// A pointer as it is, but not known before a value has been loaded: a load through it is asked for after that one's end.
template <typename T> __device__ __forceinline__ T* known_after(u32 value, T* pointer) {
    u32 none;  // the compiler does not see that it is 0
    asm volatile("{\n.reg .u32 t;\npopc.b32 t, %1;\nshr.u32 %0, t, 6;\n}" : "=r"(none) : "r"(value));
    return pointer + none;
}

// Load now, not where the compiler finds the value needed: what hides a wait is worth registers.
__device__ __forceinline__ uint4 load_early16(const void* address) {
    uint4 v;
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(address) : "memory");
    return v;
}

// An address that is worked out before what follows, for the same reason.
__device__ __forceinline__ const u16* known_early(const u16* address) {
    asm volatile("" : "+l"(address)::"memory");
    return address;
}

__device__ __forceinline__ void copy16_async(void* shared, const void* global) {
#if __CUDA_ARCH__ >= 800
    u32 target = (u32)__cvta_generic_to_shared(shared);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(target), "l"(global) : "memory");
#else
    *(uint4*)shared = *(const uint4*)global;
#endif
}

// Copy, or write zeros without reading.
__device__ __forceinline__ void copy16_or_zero(void* shared, const void* global, bool copies) {
#if __CUDA_ARCH__ >= 800
    u32 target = (u32)__cvta_generic_to_shared(shared), bytes = copies ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(global), "r"(bytes) : "memory");
#else
    *(uint4*)shared = copies ? *(const uint4*)global : make_uint4(0, 0, 0, 0);
#endif
}

__device__ __forceinline__ void commit_copies() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

template <int PENDING>
__device__ __forceinline__ void wait_copies() {  // until at most PENDING committed groups are in flight
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
#endif
}

// Bring `bytes` (a multiple of 16) on the way into the L2 cache; no effect before compute capability 9.0.
__device__ __forceinline__ void prefetch_l2(const void* address, int bytes) {
#if __CUDA_ARCH__ >= 900
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(address), "r"(bytes) : "memory");
#endif
}

typedef u32 SharedAddress;
__device__ __forceinline__ SharedAddress shared_address(const void* shared) { return __cvta_generic_to_shared(shared); }

__device__ __forceinline__ u32 load_shared4(SharedAddress address) {  // what does not change after a barrier
    u32 value;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(value) : "r"(address));
    return value;
}

// Four 8 x 8 matrices of 16-bit values from shared memory: lane i names row i % 8 of matrix i / 8. A lane gets columns
// 2q and 2q + 1 of row g of each.
__device__ __forceinline__ uint4 load_matrices(const void* row) {
    uint4 v;
    u32 source = (u32)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(source) : "memory");
    return v;
}

// The same with rows and columns exchanged: a lane gets rows 2q and 2q + 1 of column g of each.
__device__ __forceinline__ uint4 load_matrices_transposed(const void* row) {
    uint4 v;
    u32 source = (u32)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(source) : "memory");
    return v;
}

// ---- threads of a block, thread blocks of a cluster ----

// Wait until `threads` threads (whole warps) have come here under the same id, 1 to 15.
__device__ __forceinline__ void barrier(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
// Count among those threads without waiting.
__device__ __forceinline__ void barrier_arrive(int id, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

#if __CUDA_ARCH__ >= 900
// All threads of a cluster wait for each other, and see what the others wrote before.
__device__ __forceinline__ void cluster_barrier() {
    asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Write to thread block `rank` of the cluster, where this one has `mine`.
__device__ __forceinline__ void store_peer16(float4* mine, int rank, float4 v) {
    u32 address = (u32)__cvta_generic_to_shared(mine), peer;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(peer) : "r"(address), "r"(rank));
    asm volatile("st.shared::cluster.v4.f32 [%0], {%1, %2, %3, %4};"
                 ::"r"(peer), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w) : "memory");
}

// All threads of a cluster arrive, once; who has waited knows that all have. It orders nothing but what was read before:
// a release here would wait for every store to global memory.
__device__ __forceinline__ void cluster_arrive() {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.aligned;" ::: "memory"); }

// A mailbox in shared memory (8 bytes) that opens when `bytes` have been sent to it; one thread makes it, before it
// arrives at the cluster's barrier.
__device__ __forceinline__ void make_mailbox(void* mailbox, int bytes) {
    u32 at = (u32)__cvta_generic_to_shared(mailbox);
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(at) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(at), "r"(bytes) : "memory");
}

__device__ __forceinline__ void await_mailbox(void* mailbox) {
    asm volatile(
        "{\n.reg .pred open;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 open, [%0], 0;\n@!open bra again;\n}"
        ::"r"((u32)__cvta_generic_to_shared(mailbox)) : "memory");
}

// A gate in shared memory (8 bytes) that opens, again and again, when it has been passed `arrivals` times: one thread
// makes it, before a barrier. The n-th opening (from 0) is awaited with parity n % 2, by whom it then shows what those
// who passed had written.
__device__ __forceinline__ void make_gate(u64* gate, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;"
                 ::"r"((u32)__cvta_generic_to_shared(gate)), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void pass_gate(u64* gate) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"((u32)__cvta_generic_to_shared(gate)) : "memory");
}
__device__ __forceinline__ void await_gate(u64* gate, int parity) {
    asm volatile(
        "{\n.reg .pred open;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 open, [%0], %1;\n@!open bra again;\n}"
        ::"r"((u32)__cvta_generic_to_shared(gate)), "r"(parity) : "memory");
}

// Where thread block `rank` of the cluster has what this one has at `mine` in its shared memory.
typedef u32 PeerAddress;
__device__ __forceinline__ PeerAddress peer_address(const void* mine, int rank) {
    PeerAddress peer;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(peer) : "r"((u32)__cvta_generic_to_shared(mine)), "r"(rank));
    return peer;
}

// Write to a thread block of the cluster and count the bytes in its mailbox.
__device__ __forceinline__ void send8(PeerAddress to, PeerAddress mailbox, float2 v) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];"
                 ::"r"(to), "f"(v.x), "f"(v.y), "r"(mailbox) : "memory");
}
#endif

// ---- a warp's lanes together ----

__device__ __forceinline__ u32 warp_max_bits(u32 value) {  // all lanes get the largest
#if __CUDA_ARCH__ >= 800
    u32 result;
    asm volatile("redux.sync.max.u32 %0, %1, 0xffffffff;" : "=r"(result) : "r"(value));
    return result;
#else
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
        const u32 other = __shfl_xor_sync(~0u, value, step);
        value = value > other ? value : other;
    }
    return value;
#endif
}

// ---- tensor cores ----

// c[16 x 8] += a[16 x 16] * b[16 x 8]. With g = lane / 4 and q = lane % 4: a0 = (row g, k 2q..2q+1), a1 = (row g + 8,
// same k), a2 = (row g, k + 8), a3 = (row g + 8, k + 8); b0 = (k 2q..2q+1, column g), b1 = (k + 8); c0, c1 = (row g,
// columns 2q, 2q + 1), c2, c3 = (row g + 8). An element's bits depend on its row of a and its column of b alone.
__device__ __forceinline__ void multiply16x8x16(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
#if BF16
    asm(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#elif __CUDA_ARCH__ >= 800
    asm(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#else
    asm(
        "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(b0));
    asm(
        "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a2), "r"(a3), "r"(b1));
#endif
}

// The same for integers, exactly: c[16 x 8] += a[16 x 32] * b[32 x 8] of int8 (compute capability 8.0 and up). a0, a1 =
// (rows g and g + 8, k 4q..4q+3), a2, a3 = (the same, k + 16); b0, b1 = (k 4q..4q+3 and k + 16, column g); c as above.
__device__ __forceinline__ void multiply16x8x32(int (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
#if __CUDA_ARCH__ >= 800
    asm(
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#endif
}

// ---- Hopper's tensor cores: four warps, the right operand in shared memory ----

__device__ __forceinline__ u8* align1024(u8* shared) {
    u32 address = (u32)__cvta_generic_to_shared(shared);
    return shared + ((1024 - (address & 1023)) & 1023);
}

// Byte offset of 16-byte piece `piece` (of 8) of row `row` in a right operand of rows of 64 values.
__device__ __forceinline__ int operand_offset(int row, int piece) { return row * 128 + ((piece ^ (row & 7)) << 4); }

#if __CUDA_ARCH_FEAT_SM90_ALL
#if BF16
#define WGMMA_TYPES "f32.bf16.bf16"
#else
#define WGMMA_TYPES "f32.f16.f16"
#endif

__device__ __forceinline__ void publish_to_tensor_cores() {  // shared memory that this thread wrote
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
__device__ __forceinline__ void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
// What is written behind this stays behind the products in the compiled order too: they are to run beside it.
__device__ __forceinline__ void products_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;\n\tbar.warp.sync 0xffffffff;" ::: "memory");
}

// Where a right operand lies, as the instruction wants it: rows of 128 bytes, eight rows together, pieces exchanged.
typedef u64 Operand;
__device__ __forceinline__ Operand operand_at(const u8* tile) {
    return (1ull << 62) | (64ull << 32) | (1ull << 16) | ((u32)__cvta_generic_to_shared(tile) >> 4);
}
__device__ __forceinline__ Operand operand_after(Operand tile, int bytes) { return tile + (u32)(bytes >> 4); }

// Four warps give registers back, or get more, up to COUNT a thread (a multiple of 8); the latter waits for the former.
template <int COUNT>
__device__ __forceinline__ void give_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT)); }
template <int COUNT>
__device__ __forceinline__ void take_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT)); }

#define SUMS4(c) "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
#define CODES4(a) "+r"(a[0]), "+r"(a[1]), "+r"(a[2]), "+r"(a[3])
#define SUMS16(c, i) SUMS4(c[i]), SUMS4(c[i + 1]), SUMS4(c[i + 2]), SUMS4(c[i + 3])
// Wait for all products under way but the last PENDING committed: the sums `c` may be read then, and the registers of
// their left operand `a` written.
template <int PENDING, int TILES>
__device__ __forceinline__ void products_wait(float (&c)[TILES][4], u32 (&a)[4][4]) {
    if constexpr (TILES == 1)
        asm volatile("wgmma.wait_group.sync.aligned %20;"
            : SUMS4(c[0]), CODES4(a[0]), CODES4(a[1]), CODES4(a[2]), CODES4(a[3]): "n"(PENDING) : "memory");
    else if constexpr (TILES == 2)
        asm volatile("wgmma.wait_group.sync.aligned %24;"
            : SUMS4(c[0]), SUMS4(c[1]), CODES4(a[0]), CODES4(a[1]), CODES4(a[2]), CODES4(a[3]): "n"(PENDING) : "memory");
    else if constexpr (TILES == 4)
        asm volatile("wgmma.wait_group.sync.aligned %32;"
            : SUMS16(c, 0), CODES4(a[0]), CODES4(a[1]), CODES4(a[2]), CODES4(a[3]): "n"(PENDING) : "memory");
    else
        asm volatile("wgmma.wait_group.sync.aligned %48;"
            : SUMS16(c, 0), SUMS16(c, 4), CODES4(a[0]), CODES4(a[1]), CODES4(a[2]), CODES4(a[3]): "n"(PENDING) : "memory");
}

// c[64 x 8 TILES] (+)= a * the 16 columns from 16 * step on of the operand at `tile` (8 * TILES rows of 64 values, at a
// multiple of 1024 bytes). A warp holds 16 rows, as in multiply16x8x16; the sums start at zero unless `keep`.
template <int TILES>
__device__ __forceinline__ void multiply64(
    float (&c)[TILES][4], u32 a0, u32 a1, u32 a2, u32 a3, Operand tile, int step, int keep) {
    const u64 operand = tile + 2 * step;
    if constexpr (TILES == 1)
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %9, 0;\n"
            "wgmma.mma_async.sync.aligned.m64n8k16." WGMMA_TYPES " {%0, %1, %2, %3}, {%4, %5, %6, %7}, %8, p, 1, 1, 0;\n}"
            : SUMS4(c[0]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(operand), "r"(keep));
    else if constexpr (TILES == 2)
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %13, 0;\n"
            "wgmma.mma_async.sync.aligned.m64n16k16." WGMMA_TYPES " {%0, %1, %2, %3, %4, %5, %6, %7}, "
            "{%8, %9, %10, %11}, %12, p, 1, 1, 0;\n}"
            : SUMS4(c[0]), SUMS4(c[1]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(operand), "r"(keep));
    else if constexpr (TILES == 4)
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %21, 0;\n"
            "wgmma.mma_async.sync.aligned.m64n32k16." WGMMA_TYPES " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, "
            "%12, %13, %14, %15}, {%16, %17, %18, %19}, %20, p, 1, 1, 0;\n}"
            : SUMS16(c, 0) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(operand), "r"(keep));
    else
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"
            "wgmma.mma_async.sync.aligned.m64n64k16." WGMMA_TYPES " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, "
            "%12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
            "{%32, %33, %34, %35}, %36, p, 1, 1, 0;\n}"
            : SUMS16(c, 0), SUMS16(c, 4) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(operand), "r"(keep));
}
#endif

// ---- the kernel before and the kernel after (programmatic dependent launch; no effect where it is not asked for) ----

__device__ __forceinline__ void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
