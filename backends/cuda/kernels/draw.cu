// The next token of a row of logits: greedy, or by noise that depends on seed, position and id alone, as
// backends/core/src/draw.rs says.
#include "device.cuh"

struct DrawArgs {
    u64 logits, rules, out;  // [rows, width] f32; [rows] Rule; [rows] Choice
    u32 width;
};

struct Rule {
    u32 kind;  // 0: the host draws, 1: greedy, 2: by noise
    u32 keys[2];
    float temperature;
};

struct Choice {
    u32 id;          // 0 where nothing can be drawn
    u32 not_finite;  // first id whose logit is no finite number, or 0xffffffff
};

__device__ __forceinline__ u32 mixed(u32 x) {
    x = (x ^ x >> 16) * 0x7feb352du;
    x = (x ^ x >> 15) * 0x846ca68bu;
    return x ^ x >> 16;
}

// The better of two: the greater score, on ties the lower id.
__device__ __forceinline__ void better(double& score, u32& id, double other, u32 other_id) {
    if (other > score || (other == score && other_id < id)) score = other, id = other_id;
}

// One block of 1,024 threads a row.
KERNEL(draw_rows, DrawArgs, 1024) {
    __shared__ double scores[32];
    __shared__ float peaks[32];
    __shared__ u32 ids[32], faults[32];
    const Rule rule = ((const Rule*)a.rules)[blockIdx.x];
    const float* logits = (const float*)a.logits + (u64)blockIdx.x * a.width;
    u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    float peak = MINUS_INFINITY;
    u32 fault = 0xffffffffu;
    for (u32 i = threadIdx.x; i < a.width; i += blockDim.x) {
        float x = logits[i];
        if ((float_bits(x) & 0x7f800000u) == 0x7f800000u && i < fault) fault = i;
        peak = fmaxf(peak, x);
    }
    peak = warp_max(peak);
    for (int mask = 16; mask > 0; mask /= 2) {
        u32 other = lane_xor(fault, mask);
        fault = other < fault ? other : fault;
    }
    if (lane == 0) peaks[warp] = peak, faults[warp] = fault;
    __syncthreads();
    for (u32 w = 0; w < warps; ++w) {
        peak = fmaxf(peak, peaks[w]);
        fault = faults[w] < fault ? faults[w] : fault;
    }
    double best = -1.7976931348623157e308;
    u32 id = 0xffffffffu;
    for (u32 i = threadIdx.x; i < a.width; i += blockDim.x) {
        double score = logits[i];
        if (rule.kind == 2) {
            double w = ((double)mixed(mixed(i ^ rule.keys[0]) + rule.keys[1]) + 0.5) / 4294967296.0;
            score = (score - (double)peak) / (double)rule.temperature - log(-log1p(-w));
        }
        better(best, id, score, i);
    }
    for (int mask = 16; mask > 0; mask /= 2) {
        double other = lane_xor(best, mask);
        u32 other_id = lane_xor(id, mask);
        better(best, id, other, other_id);
    }
    if (lane == 0) scores[warp] = best, ids[warp] = id;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (u32 w = 1; w < warps; ++w) better(best, id, scores[w], ids[w]);
        Choice choice = {fault == 0xffffffffu ? id : 0, fault};
        ((Choice*)a.out)[blockIdx.x] = choice;
    }
}

struct ResolveArgs {
    u64 inputs, drawn, out;  // [count] u32 id or row | 2^31; [rows] Choice; [count] u32
    u32 count;
};

// Ids in flight from the step before.
KERNEL(resolve, ResolveArgs, 256) {
    for (u32 i = threadIdx.x; i < a.count; i += blockDim.x) {
        u32 input = ((const u32*)a.inputs)[i];
        ((u32*)a.out)[i] = input >> 31 ? ((const Choice*)a.drawn)[input & 0x7fffffffu].id : input;
    }
}
