// Tensor memory of the emulated device, and barriers in shared memory. Products are done only when no thread can go on without them,
// loads and stores when they are waited for; each cell knows who touched it last, so that a wait or a fence that is missing shows.
#include "device.h"
#include <algorithm>
#include <deque>
#include <map>

namespace {
const u32 LANES = 128, COLUMNS = 512, THREADS_MAX = 1024;
const u32 VERSION = 1 << 16 | 1;  // of tiles, behind their strides: permuted by 128 bytes, and this generation's
const u32 KIND = 1 << 4 | 1 << 7 | 1 << 10;  // bf16, sums in f32

struct Cell {
    u32 bits;
    bool written, touched, storing;
    u16 thread;           // that has touched this last,
    Seen at;              // and how often it had arrived and fenced then
    u32 products;         // the first arrival of products behind the last of them that has touched this, or 0
};

struct MemoryBarrier {
    u32 count, left, phase;
    bool shown;
    Known arriving, arrived;
};

// What one thread has asked for: a product, or an arrival.
struct Asked {
    u64* barrier;
    u32 d, x_held;
    u64 x, w;
    u32 kind;
    bool held, adds;
    Order order;
};

struct Load {
    float* r;
    u32 columns, at;
};

struct Store {
    u32 at;
    float r[32];
};

Cell cells[LANES][COLUMNS];
bool taken, may_take;
u32 arrivals, lost;  // of this launch; which of them never comes, or 0
u32 waiting, times;  // threads at barriers; how often all of them have given up
std::map<u64, MemoryBarrier> barriers;
std::deque<Asked> line;
int asker;
std::vector<Load> loads[THREADS_MAX];
std::vector<Store> stores[THREADS_MAX];

std::string name(u32 lane, u32 column) {
    return "lane " + std::to_string(lane) + ", column " + std::to_string(column) + " of tensor memory";
}

Cell& cell_at(u32 lane, u32 column) {
    if (!taken || lane >= LANES || column >= COLUMNS) checks_fail("outside of tensor memory that is taken: " + name(lane, column));
    return cells[lane][column];
}

// What a thread or a product does to a cell comes behind all that was done to it before.
void check(Cell& cell, u32 lane, u32 column, bool write) {
    if (checks_given_up()) return;
    const u16 me = checks_actor();
    if (cell.storing) checks_fail("while a store fills it: " + name(lane, column));
    if (!write && !cell.written) checks_fail("read before anybody wrote " + name(lane, column));
    if (cell.touched && cell.thread != me) {
        const Seen seen = checks_seen_tensor(cell.thread);
        const std::string whose = " of thread " + std::to_string(cell.thread) + ": ";
        if (seen.clock <= cell.at.clock) checks_fail("race with an access" + whose + name(lane, column));
        if (seen.tensor_fences <= cell.at.tensor_fences) checks_fail("no fence behind an access" + whose + name(lane, column));
    }
    if (me != THREADS_MAX && cell.products && checks_seen_tensor(THREADS_MAX).clock < cell.products)
        checks_fail("products have not been waited for, or no fence since: " + name(lane, column));
}

void touch(Cell& cell) {
    if (checks_actor() == THREADS_MAX) {
        cell.products = checks_own().clock + 1;
        return;
    }
    cell.touched = true;
    cell.thread = checks_actor();
    cell.at = checks_own();
}

// The lanes of the warp, whose threads all are here with the same address.
u32 own_lane(u32 at) {
    const u8* all = exchange(&at, sizeof at);
    if (memcmp(all, &at, sizeof at)) checks_fail("lanes of a warp name unlike columns of tensor memory");
    if (at >> 16 != threadIdx.x / 32 % 4 * 32) checks_fail("a warp reaches for lanes that are not its own");
    return (at >> 16) + this_lane();
}

MemoryBarrier& barrier_of(u64* at) {
    auto found = barriers.find((u64)at);
    if (found == barriers.end()) checks_fail("nobody has made this barrier");
    if (!found->second.shown) checks_fail("no fence has shown this barrier");
    return found->second;
}

void arrive(MemoryBarrier& barrier) {
    if (++arrivals == lost) return;
    checks_release(barrier.arriving);
    if (--barrier.left) return;
    barrier.left = barrier.count;
    ++barrier.phase;
    barrier.arrived.swap(barrier.arriving);
    barrier.arriving.clear();
    moved();
}

float float_of(const bf16* x) {
    return bits_float((u32)x->bits << 16);
}

void multiply(const Asked& product) {
    const u32 kind = product.kind, columns = (kind >> 17 & 63) * 8;
    const bool turned = kind >> 16 & 1;
    if ((kind & ~(1u << 16 | 63u << 17 | 31u << 24)) != KIND) checks_fail("products that are not of bf16 with sums in f32");
    if ((kind >> 24 & 31) * 16 != LANES || columns % 16 || columns < 16 || columns > 256) checks_fail("products of no such size");
    if (product.d >> 16 || product.x_held >> 16) checks_fail("products that do not begin at lane 0");
    std::vector<float> x(LANES * 16), w(columns * 16);
    for (u32 row = 0; row < LANES; ++row)
        for (u32 k = 0; k < 16; ++k) {
            float& to = x[row * 16 + k];
            if (product.held) {
                const u32 column = product.x_held + k / 2;
                Cell& cell = cell_at(row, column);
                check(cell, row, column, false);
                touch(cell);
                to = k % 2 ? high_half(cell.bits) : low_half(cell.bits);
                continue;
            }
            const bf16* from = tile_element(product.x, VERSION, row, k, false);
            if (k % 8 == 0) checks_product((u64)from);
            to = float_of(from);
        }
    for (u32 n = 0; n < columns; ++n)
        for (u32 k = 0; k < 16; ++k) {
            const bf16* from = tile_element(product.w, VERSION, n, k, turned);
            if ((turned ? n : k) % 8 == 0) checks_product((u64)from);
            w[n * 16 + k] = float_of(from);
        }
    for (u32 row = 0; row < LANES; ++row)
        for (u32 n = 0; n < columns; ++n) {
            Cell& cell = cell_at(row, product.d + n);
            check(cell, row, product.d + n, !product.adds);
            float sum = product.adds ? bits_float(cell.bits) : 0.0f;
            for (u32 k = 0; k < 16; ++k) sum += x[row * 16 + k] * w[n * 16 + k];
            cell.bits = float_bits(sum);
            cell.written = true;
            touch(cell);
        }
}

void ask(Asked asked) {
    if (asker >= 0 && asker != (int)threadIdx.x) checks_fail("products that two threads ask for have no order");
    asker = threadIdx.x;
    asked.order = checks_order();
    line.push_back(asked);
}
}  // namespace

bool elected() {
    warp_meets();
    return this_lane() == 0;
}

void tensor_take(u32* at) {
    checks_barriers();
    warp_meets();
    if (this_lane()) return;
    if (taken || !may_take) checks_fail("takes tensor memory twice");
    checks_access((u64)at, sizeof *at, true);
    *at = 0;
    for (auto& lane : cells)
        for (Cell& cell : lane) cell = Cell(), cell.bits = ~0u;
    taken = true, may_take = false;
}

void tensor_give(u32 memory) {
    warp_meets();
    if (this_lane()) return;
    if (!taken || memory != 0) checks_fail("gives back what it has not taken");
    for (u32 lane = 0; lane < LANES; ++lane)
        for (u32 column = 0; column < COLUMNS; ++column) check(cells[lane][column], lane, column, true);
    taken = false;
}

void tensor_product(u32 d, u64 x, u64 w, u32 kind, bool adds) {
    ask({nullptr, d, 0, x, w, kind, false, adds, {}});
}

void tensor_product_held(u32 d, u32 x, u64 w, u32 kind, bool adds) {
    ask({nullptr, d, x, 0, w, kind, true, adds, {}});
}

void tensor_commit(u64* barrier) {
    barrier_of(barrier);
    ask({barrier, 0, 0, 0, 0, 0, false, false, {}});
}

void tensor_fence_before() {
    checks_tensor_before();
}

void tensor_fence_after() {
    checks_tensor_after();
}

void tensor_load_of(float* r, u32 columns, u32 at) {
    own_lane(at);
    std::fill(r, r + columns, NAN);
    loads[threadIdx.x].push_back({r, columns, at});
}

void tensor_loaded_all() {
    for (const Load& load : loads[threadIdx.x]) {
        const u32 lane = (load.at >> 16) + this_lane();
        for (u32 i = 0; i < load.columns; ++i) {
            const u32 column = (load.at & 0xffff) + i;
            Cell& cell = cell_at(lane, column);
            check(cell, lane, column, false);
            touch(cell);
            load.r[i] = bits_float(cell.bits);
        }
    }
    loads[threadIdx.x].clear();
}

void tensor_store(u32 at, const float (&r)[32]) {
    const u32 lane = own_lane(at);
    for (const Load& load : loads[threadIdx.x])
        if (r < load.r + load.columns && load.r < r + 32) checks_fail("a store of registers that a load fills");
    Store store = {at, {}};
    memcpy(store.r, r, sizeof r);
    for (u32 i = 0; i < 32; ++i) {
        Cell& cell = cell_at(lane, (at & 0xffff) + i);
        check(cell, lane, (at & 0xffff) + i, true);
        cell.storing = true;
    }
    stores[threadIdx.x].push_back(store);
}

void tensor_stored() {
    for (const Store& store : stores[threadIdx.x])
        for (u32 i = 0; i < 32; ++i) {
            Cell& cell = cell_at((store.at >> 16) + this_lane(), (store.at & 0xffff) + i);
            cell.storing = false;
            cell.written = true;
            cell.bits = float_bits(store.r[i]);
            touch(cell);
        }
    stores[threadIdx.x].clear();
}

void barrier_make(u64* at, u32 arrivals) {
    checks_barriers();
    checks_access((u64)at, sizeof *at, true);
    barriers[(u64)at] = {arrivals, arrivals, 0, false, {}, {}};
}

void barriers_made() {
    for (auto& [at, barrier] : barriers) barrier.shown = true;
}

void barrier_arrive(u64* at) {
    checks_access((u64)at, sizeof *at, false);
    arrive(barrier_of(at));
}

bool barrier_wait(u64* at, u32 parity) {
    checks_access((u64)at, sizeof *at, false);
    MemoryBarrier& barrier = barrier_of(at);
    const u32 since = times;
    bool passed;
    ++waiting;
    wait_until([&] { return (passed = barrier.phase % 2 != parity) || times != since; });
    --waiting;
    if (passed) checks_acquire(barrier.arrived);
    else checks_give_up();
    return passed;
}

void tensor_launch(u32 loses) {
    arrivals = 0, lost = loses;
}

void tensor_block() {
    waiting = 0;
    taken = false, may_take = true;
    barriers.clear();
    line.clear();
    asker = -1;
    for (auto& of_thread : loads) of_thread.clear();
    for (auto& of_thread : stores) of_thread.clear();
}

bool tensor_step() {
    while (!line.empty()) {
        // Kept where a failure may leave it.
        static Asked asked;
        asked = line.front();
        line.pop_front();
        registers.thread = {(u32)asker, 0, 0};
        checks_act(&asked.order);
        if (asked.barrier) arrive(barrier_of(asked.barrier));
        else multiply(asked);
        checks_act(nullptr);
        if (asked.barrier) return true;
    }
    return false;
}

bool tensor_time_passes() {
    if (!lost || !waiting) return false;
    ++times;
    return true;
}

const char* tensor_end() {
    if (!line.empty() && !checks_given_up()) return "ended with products on their way";
    return taken ? "ended with tensor memory" : nullptr;
}

void tensor_thread_end() {
    if (!loads[threadIdx.x].empty() || !stores[threadIdx.x].empty()) checks_fail("ended with loads or stores on their way");
}
