// Inner loops of exchanges and of sums in float64, for float32 on a CPU.
//
// Every function does the arithmetic of its counterpart in `swap_steps.py` and `sums.py`, in the same order and without
// fused multiply-add, so that the bits are the same with and without these kernels. A thread works on rows of its own.

#include <cstdint>
#include <limits>
#include <vector>

namespace {

constexpr float INFINITE = std::numeric_limits<float>::infinity();
constexpr int64_t LANES = 16;

// The first place of the lowest of `count` costs.
int64_t lowest(const float* costs, int64_t count) {
    float lanes[LANES];
    for (int64_t lane = 0; lane < LANES; ++lane) lanes[lane] = INFINITE;
    int64_t whole = count - count % LANES;
    for (int64_t k = 0; k < whole; k += LANES)
        for (int64_t lane = 0; lane < LANES; ++lane)
            lanes[lane] = costs[k + lane] < lanes[lane] ? costs[k + lane] : lanes[lane];
    float least = INFINITE;
    for (int64_t lane = 0; lane < LANES; ++lane) least = lanes[lane] < least ? lanes[lane] : least;
    for (int64_t k = whole; k < count; ++k) least = costs[k] < least ? costs[k] : least;
    int64_t place = 0;
    for (; place < whole; place += LANES) {
        bool here = false;
        for (int64_t lane = 0; lane < LANES; ++lane) here |= costs[place + lane] == least;
        if (here) break;
    }
    while (place < count - 1 && costs[place] != least) ++place;
    return place;
}

// Whether the state of a row can be compared; a row with NaN or infinity is left as it is.
bool finite(const float* slopes, int64_t width) {
    float sum = 0;
    for (int64_t k = 0; k < width; ++k) sum += slopes[k] * 0;
    return sum == 0;
}

// A row of a Linear whose weights are exchanged between any two places; see `FreeRows`.
struct FreeRow {
    const float* gram;
    uint8_t* keep;
    float* correlation;
    int64_t width;
    std::vector<float> alone, kept_alone, pruned_alone, turn, costs;

    FreeRow(const float* gram, int64_t width)
        : gram(gram), keep(nullptr), correlation(nullptr), width(width), alone(width), kept_alone(width),
          pruned_alone(width), turn(width), costs(width) {}

    void begin(const float* values, uint8_t* row_keep, float* row_correlation) {
        keep = row_keep;
        correlation = row_correlation;
        for (int64_t k = 0; k < width; ++k) {
            alone[k] = (values[k] * values[k]) * gram[k * width + k];
            turn[k] = keep[k] ? 2 * values[k] : -2 * values[k];
            set_state(k);
        }
    }

    void set_state(int64_t k) {
        kept_alone[k] = keep[k] ? alone[k] : INFINITE;
        pruned_alone[k] = keep[k] ? INFINITE : alone[k];
    }

    // Exchange the cheapest weight of `first` and, once c knows of that, of `second`; false where both cost.
    bool exchange(const float* __restrict__ first, const float* __restrict__ second) {
        const float* __restrict__ turns = turn.data();
        float* __restrict__ to = costs.data();
        float* __restrict__ c = correlation;
        for (int64_t k = 0; k < width; ++k) to[k] = first[k] + turns[k] * c[k];
        int64_t one = lowest(costs.data(), width);
        float cost = costs[one], factor = turn[one] / 2;
        const float* __restrict__ row = gram + one * width;
        for (int64_t k = 0; k < width; ++k) to[k] = second[k] + turns[k] * (c[k] + row[k] * factor);
        int64_t other = lowest(costs.data(), width);
        if (!(cost + costs[other] < 0)) return false;
        float further = turn[other] / 2;
        const float* __restrict__ next = gram + other * width;
        for (int64_t k = 0; k < width; ++k) c[k] = (c[k] + row[k] * factor) + next[k] * further;
        for (int64_t k : {one, other}) {
            keep[k] = !keep[k];
            turn[k] = -turn[k];
            set_state(k);
        }
        return true;
    }

    void run(int64_t most) {
        for (int64_t step = 0, idle = 0; step < most && idle < 2; ++step) {
            bool grow_first = step % 2 == 0;
            const float* first = grow_first ? pruned_alone.data() : kept_alone.data();
            const float* second = grow_first ? kept_alone.data() : pruned_alone.data();
            idle = exchange(first, second) ? 0 : idle + 1;
        }
    }
};

// A row whose weights are exchanged within groups; see `GroupRows` for the layout and for J.
struct GroupRow {
    const float* gram;
    int64_t width, size, groups, pairs;
    uint8_t* keep;
    float* slopes;
    std::vector<float> alone, turn, coupled, joint, costs;
    std::vector<int64_t> one_of, other_of;

    GroupRow(const float* gram, int64_t width, int64_t size)
        : gram(gram), width(width), size(size), groups(width / size), pairs(size * (size - 1) / 2), keep(nullptr),
          slopes(nullptr), alone(width), turn(width), coupled(pairs * groups), joint(pairs * groups),
          costs(pairs * groups) {
        for (int64_t p = 0; p < size; ++p)
            for (int64_t q = p + 1; q < size; ++q) {
                one_of.push_back(p);
                other_of.push_back(q);
            }
    }

    const float* gram_row(int64_t place, int64_t group) const { return gram + (group * size + place) * width; }

    void begin(const float* values, uint8_t* row_keep, float* row_slopes) {
        keep = row_keep;
        slopes = row_slopes;
        for (int64_t p = 0; p < size; ++p)
            for (int64_t g = 0; g < groups; ++g) {
                int64_t k = p * groups + g;
                alone[k] = (values[k] * values[k]) * gram_row(p, g)[k];
                turn[k] = keep[k] ? 2 * values[k] : -2 * values[k];
            }
        for (int64_t pair = 0; pair < pairs; ++pair)
            for (int64_t g = 0; g < groups; ++g) {
                int64_t one = one_of[pair] * groups + g, other = other_of[pair] * groups + g;
                float product = values[one] * values[other];
                float coupling = gram_row(one_of[pair], g)[other];
                coupled[pair * groups + g] = (alone[one] + alone[other]) + (-2 * product) * coupling;
                set_joint(pair, g);
            }
    }

    void set_joint(int64_t pair, int64_t g) {
        bool exchangeable = keep[one_of[pair] * groups + g] != keep[other_of[pair] * groups + g];
        joint[pair * groups + g] = exchangeable ? coupled[pair * groups + g] : INFINITE;
    }

    // Exchange the best pair of all groups; false where it costs.
    bool exchange() {
        for (int64_t pair = 0; pair < pairs; ++pair) {
            const float* one = slopes + one_of[pair] * groups;
            const float* other = slopes + other_of[pair] * groups;
            const float* own = joint.data() + pair * groups;
            float* to = costs.data() + pair * groups;
            for (int64_t g = 0; g < groups; ++g) to[g] = (one[g] + other[g]) + own[g];
        }
        int64_t best = lowest(costs.data(), pairs * groups);
        if (!(costs[best] < 0)) return false;
        int64_t pair = best / groups, g = best % groups;
        int64_t one = one_of[pair] * groups + g, other = other_of[pair] * groups + g;
        float factor = turn[one] / 2, further = turn[other] / 2;
        const float* __restrict__ row = gram_row(one_of[pair], g);
        const float* __restrict__ next = gram_row(other_of[pair], g);
        const float* __restrict__ turns = turn.data();
        float* __restrict__ s = slopes;
        for (int64_t k : {one, other}) {
            keep[k] = !keep[k];
            turn[k] = -turn[k];
            slopes[k] = -slopes[k];
        }
        for (int64_t k = 0; k < width; ++k) s[k] = s[k] + turns[k] * (row[k] * factor + next[k] * further);
        for (int64_t changed = 0; changed < pairs; ++changed) set_joint(changed, g);
        return true;
    }

    void run(int64_t most) {
        for (int64_t step = 0; step < most && exchange(); ++step) {
        }
    }
};

}  // namespace

extern "C" {

void exchange_free(const float* values, uint8_t* keep, float* correlation, const float* gram, int64_t rows,
                   int64_t width, int64_t most) {
    FreeRow row(gram, width);
    for (int64_t r = 0; r < rows; ++r) {
        row.begin(values + r * width, keep + r * width, correlation + r * width);
        if (finite(row.correlation, width)) row.run(most);
    }
}

void exchange_groups(const float* values, uint8_t* keep, float* slopes, const float* gram, int64_t rows, int64_t width,
                     int64_t size, int64_t most) {
    GroupRow row(gram, width, size);
    for (int64_t r = 0; r < rows; ++r) {
        row.begin(values + r * width, keep + r * width, slopes + r * width);
        if (finite(row.slopes, width)) row.run(most);
    }
}

void add_to_double(double* total, const float* part, int64_t count) {
    for (int64_t k = 0; k < count; ++k) total[k] += part[k];
}

}  // extern "C"
