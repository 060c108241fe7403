// The next token of a row of logits: greedy, or by noise that depends on seed, position and id alone among the ids that filters
// keep, as backends/core/src/draw.rs says.
#include "device.cuh"

struct DrawArgs {
    u64 logits, rules, out;  // [rows, width] f32; [rows] Rule; [rows] Choice
    u32 width;
};

struct Rule {
    u32 kind;  // 0: the host gets the logits, 1: greedy, 2: by noise
    u32 keys[2];
    float temperature;
    u32 top_k;  // 0: all
    float top_p, min_p;
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

// Words in the order of the numbers that they are made from, and back.
__device__ __forceinline__ u32 key_of(float x) {
    u32 bits = float_bits(x);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float number_of(u32 key) {
    return bits_float(key >> 31 ? key & 0x7fffffffu : ~key);
}

// A row of logits, its temperature, and what the filters of its rule keep so far: keys above `edge`, and of those at it the
// ids up to `last`.
struct Row {
    const float* logits;
    u32 width;
    float peak, temperature;
    u32 edge, last;
};

__device__ __forceinline__ bool keeps(const Row& row, u32 key, u32 id) {
    return key > row.edge || (key == row.edge && id <= row.last);
}

// Whole numbers, so that sums do not depend on their order: 2^44 for the most likely id.
__device__ __forceinline__ u64 mass_of(const Row& row, float x) {
    return (u64)(expf((x - row.peak) / row.temperature) * 17592186044416.0f);
}

__device__ __forceinline__ u64 warp_sum_of(u64 x) {
    for (int mask = 16; mask > 0; mask /= 2) x += lane_xor(x, mask);
    return x;
}

const u32 BINS = 2048, NOT_FOUND = 0xffffffffu;

// Kept ids with this key up to id `last`, in every thread.
__device__ u32 count_at(const Row& row, u32 key, u32 last) {
    float count = 0.0f;
    for (u32 i = threadIdx.x; i < row.width && i <= last; i += blockDim.x)
        if (key_of(row.logits[i]) == key && keeps(row, key, i)) count += 1.0f;
    return (u32)block_sum(count);
}

// Goes through what is kept from the most likely id on, until `goal` is reached: so many ids, or so much of their mass. What
// comes after is no longer kept. Three rounds, of 11, 11 and 10 bits of the key.
__device__ void keep_first(Row& row, u64 goal, bool by_mass) {
    __shared__ u64 bins[BINS];
    __shared__ u64 left;
    __shared__ u32 found;
    u32 prefix = 0;
    for (u32 shift = 21, bits = 11;;) {
        for (u32 i = threadIdx.x; i < BINS; i += blockDim.x) bins[i] = 0;
        __syncthreads();
        for (u32 i = threadIdx.x; i < row.width; i += blockDim.x) {
            float x = row.logits[i];
            u32 key = key_of(x);
            if (!keeps(row, key, i) || (u64)key >> (shift + bits) != prefix) continue;
            u64 weight = by_mass ? mass_of(row, x) : 1;
            if (weight) shared_add(&bins[key >> shift & ((1u << bits) - 1)], weight);
        }
        __syncthreads();
        if (threadIdx.x < 32) {
            // The greatest bins are the first lane's.
            const u32 lane = threadIdx.x, each = (1u << bits) / 32, top = (1u << bits) - 1 - lane * each;
            u64 own = 0;
            for (u32 i = 0; i < each; ++i) own += bins[top - i];
            u64 all = own;
            for (u32 apart = 1; apart < 32; apart *= 2) {
                u64 other = lane_get(all, (lane - apart) & 31);
                if (lane >= apart) all += other;
            }
            u64 before = all - own;
            const bool mine = before < goal && goal <= all;
            if (!lane_ballot(mine) && lane == 0) found = NOT_FOUND;
            if (mine) {
                u32 bin = top;
                while (before + bins[bin] < goal) before += bins[bin--];
                found = bin;
                left = goal - before;
            }
        }
        __syncthreads();
        if (found == NOT_FOUND) return;  // all together do not reach it
        prefix = prefix << bits | found;
        goal = left;
        if (shift == 0) break;
        bits = shift == 21 ? 11 : 10;
        shift -= bits;
        __syncthreads();  // both were read
    }
    // Of ids with the same logit the lower ones come first.
    u64 weight = by_mass ? mass_of(row, number_of(prefix)) : 1;
    u64 need = weight ? (goal + weight - 1) / weight : 1;
    u32 last = 0xffffffffu;
    if (need < count_at(row, prefix, last)) {
        u32 low = 0;
        last = row.width - 1;
        while (low < last) {
            u32 middle = (low + last) / 2;
            if (count_at(row, prefix, middle) >= need) last = middle;
            else low = middle + 1;
        }
    } else if (prefix == row.edge) {
        last = row.last;
    }
    row.edge = prefix;
    row.last = last;
}

// The mass of what is kept, in every thread.
__device__ u64 mass_kept(const Row& row) {
    __shared__ u64 total;
    if (threadIdx.x == 0) total = 0;
    __syncthreads();
    u64 own = 0;
    for (u32 i = threadIdx.x; i < row.width; i += blockDim.x) {
        float x = row.logits[i];
        if (keeps(row, key_of(x), i)) own += mass_of(row, x);
    }
    own = warp_sum_of(own);
    if (threadIdx.x % 32 == 0) shared_add(&total, own);
    __syncthreads();
    return total;
}

// min-p, top-k, top-p, in this order.
__device__ void filter(Row& row, const Rule& rule) {
    if (rule.min_p > 0.0f) {
        double least = (double)row.peak + (double)row.temperature * log((double)rule.min_p);
        float x = (float)least;
        u32 edge = key_of(x) + ((double)x < least ? 1 : 0), peak = key_of(row.peak);
        row.edge = edge < peak ? edge : peak;
    }
    if (rule.top_k > 0 && rule.top_k < row.width) keep_first(row, rule.top_k, false);
    if (rule.top_p < 1.0f) {
        u64 goal = (u64)ceil((double)rule.top_p * (double)mass_kept(row));
        keep_first(row, goal > 0 ? goal : 1, true);
    }
}

// The greatest noise of any id, and of one whose random bits begin with so many zeros: -ln(-ln(1 - w)) <= -ln w.
const float NOISE_MAX = 22.9f, LN_2 = 0.6931472f;

// One block of 1,024 threads a row.
KERNEL(draw_rows, DrawArgs, 1024) {
    __shared__ double scores[32];
    __shared__ float peaks[32];
    __shared__ u32 ids[32], faults[32];
    const Rule rule = ((const Rule*)a.rules)[blockIdx.x];
    const float* logits = (const float*)a.logits + (u64)blockIdx.x * a.width;
    u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    float peak = MINUS_INFINITY;
    u32 fault = 0xffffffffu, id = 0xffffffffu;
    for (u32 i = threadIdx.x; i < a.width; i += blockDim.x) {
        float x = logits[i];
        if ((float_bits(x) & 0x7f800000u) == 0x7f800000u && i < fault) fault = i;
        if (x > peak) peak = x, id = i;
    }
    for (int mask = 16; mask > 0; mask /= 2) {
        u32 other = lane_xor(fault, mask), other_id = lane_xor(id, mask);
        float other_peak = lane_xor(peak, mask);
        fault = other < fault ? other : fault;
        if (other_peak > peak || (other_peak == peak && other_id < id)) peak = other_peak, id = other_id;
    }
    if (lane == 0) peaks[warp] = peak, faults[warp] = fault, ids[warp] = id;
    __syncthreads();
    for (u32 w = 0; w < warps; ++w) {
        if (peaks[w] > peak || (peaks[w] == peak && ids[w] < id)) peak = peaks[w], id = ids[w];
        fault = faults[w] < fault ? faults[w] : fault;
    }
    if (rule.kind == 2 && fault == 0xffffffffu) {
        Row row = {logits, a.width, peak, rule.temperature, 0, 0xffffffffu};
        filter(row, rule);
        double best = -1.7976931348623157e308;
        id = 0xffffffffu;
        for (u32 i = threadIdx.x; i < a.width; i += blockDim.x) {
            float x = logits[i];
            if (!keeps(row, key_of(x), i)) continue;
            // Most ids are out of reach whatever their noise; some of the rest are by the first bits of theirs. Logarithms of doubles
            // are for the others.
            float z = (x - peak) / rule.temperature, slack = 0.01f - 1e-5f * z;
            if ((double)(z + NOISE_MAX + slack) <= best) continue;
            u32 bits = mixed(mixed(i ^ rule.keys[0]) + rule.keys[1]);
            if ((double)(z + (float)(__clz(bits) + 1) * LN_2 + slack) <= best) continue;
            double w = ((double)bits + 0.5) / 4294967296.0;
            better(best, id, ((double)x - (double)peak) / (double)rule.temperature - log(-log1p(-w)), i);
        }
        for (int mask = 16; mask > 0; mask /= 2) {
            double other = lane_xor(best, mask);
            u32 other_id = lane_xor(id, mask);
            better(best, id, other, other_id);
        }
        __syncthreads();  // ids were read
        if (lane == 0) scores[warp] = best, ids[warp] = id;
        __syncthreads();
        for (u32 w = 0; w < warps; ++w) better(best, id, scores[w], ids[w]);
    }
    if (threadIdx.x == 0) {
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
