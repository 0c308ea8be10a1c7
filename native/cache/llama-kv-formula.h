#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

// the formula of a policy that scores tokens: which of them a KV head can spare
// a small object with one formula; protection, scopes, ties and slots are not its business (docs/adding-a-policy.md)

// sums of their own, so that the compiler can vectorise
inline float llama_kv_dot(const float * a, const float * b, uint32_t n) {
    float sum[8] = {};

    uint32_t c = 0;
    for (; c + 8 <= n; c += 8) {
        for (uint32_t l = 0; l < 8; ++l) {
            sum[l] += a[c + l]*b[c + l];
        }
    }
    for (; c < n; ++c) {
        sum[0] += a[c]*b[c];
    }

    return ((sum[0] + sum[4]) + (sum[1] + sum[5])) + ((sum[2] + sum[6]) + (sum[3] + sum[7]));
}

// what is kept per (layer, slot, KV head) for a formula, beside the keys and values
struct llama_kv_formula_needs {
    bool weights = false; // attention weights, summed over the queries and over the query heads of the KV head

    // each query multiplies the sum of the earlier ones by this: 1 accumulates, 0 leaves the newest query
    float decay = 1.0f;

    // > 0: the sums hold the last `window` queries before a choice, and no others
    uint32_t window = 0;

    // norms of the token's key and value as the model made them, taken once when the token is written
    bool k_l2 = false;
    bool v_l1 = false;
    bool v_l2 = false;

    // the stored rows, dequantised; read at each choice, so they are costly
    bool k_rows = false;
    bool v_rows = false;

    // k_rows as the model made them, before the rotation to a position, but for the cache's rounding; costs a sine and a cosine
    //   per pair of values
    bool k_unrotated = false;

    // a number drawn for each token when it is written (in place of weights)
    bool drawn = false;

    // a number that score() may change, 0 when the token is written
    bool state = false;

    // in place of `state`: a number that the caller sets (llama_kv_policy_set_scores)
    bool given = false;

    // the view is ordered by position (costs a sort per head and choice)
    bool ordered = false;

    // score() gives numerators and denominators, which are summed over the heads that decide together, and over a page
    bool ratio = false;

    // no score is below zero, so that it can be multiplied by how little a token repeats others: see llama_kv_formula::graph
    bool positive = false;

    // > 0: whole pages go, at once: so many tokens of neighbouring ranks, whose scores are summed
    uint32_t page_size = 0;
};

// the kept tokens of one KV head of one layer; protected and recent ones are among them
struct llama_kv_head_view {
    uint32_t n;              // kept tokens
    uint32_t n_sinks;        // of them: the first tokens of the sequence,
    uint32_t n_pinned;       //   those after them that the caller protects,
    uint32_t n_old;          //   and all that are not recent, sinks and pinned ones included
                             // ordered: the sinks, the pinned, the other old and the recent tokens lie in this order
    int32_t  pos_min;        // a token may go if its position is in [pos_min, pos_max]
    int32_t  pos_max;
    uint32_t n_group;        // query heads that attend to this KV head
    uint32_t il;             // the model's layer
    uint32_t i_head;         // KV head of the layer
    const int32_t * pos;     // [n]

    // [n]; nullptr unless needed
    const float * weights;   // or the drawn numbers
    const float * k_norm;    // L2
    const float * v_norm;    // L1 or L2
    float *       state;     // what the last choices have left
    const float * given;     // what the caller has set, NaN where he has not

    // [n, n_embd_k], [n, n_embd_v]; nullptr unless needed
    const float * k_rows;
    const float * v_rows;
    uint32_t n_embd_k;
    uint32_t n_embd_v;
};

// a number of the formula that a policy's text may set: "a2sf:decay=0.9"
struct llama_kv_formula_param {
    enum kind { REAL, COUNT, ODD };

    const char * name;
    kind         type;
    double *     value;     // in the formula, its default at first
    double       published; // the authors'
    double       min;
    double       max;
    const char * help;      // one line
};

class llama_kv_formula {
public:
    virtual ~llama_kv_formula() = default;

    virtual llama_kv_formula_needs needs() const = 0;

    // valid as long as the formula is; set before needs() and score() are called
    virtual std::vector<llama_kv_formula_param> params() { return {}; }

    // GraphKV (Li et al. 2025, arXiv 2509.00388, section 4), for what a chunk evicts: the best tokens of a unit, this share of those that
    //   stay, multiply the score of the `graph_near` others whose keys are nearest by 1 - cosine; 0: off
    double graph      = 0.0;
    double graph_near = 16.0;

    std::vector<llama_kv_formula_param> all_params() {
        auto res = params();
        if (needs().positive) {
            res.push_back({ "graph", llama_kv_formula_param::REAL, &graph, 0.3, 0.0, 1.0, "GraphKV, at prompt time: share of the kept tokens that lower the scores of those like them; 0: off" });
            res.push_back({ "graph_near", llama_kv_formula_param::COUNT, &graph_near, 16, 1, 4096, "how many tokens like it each of them lowers (the paper adapts it)" });
        }
        return res;
    }

    // out[i]: the worth of the i-th kept token, higher is kept; of equals the oldest goes first
    // den[i]: only if needs().ratio, else nullptr
    // called for several heads at once, from several threads
    virtual void score(const llama_kv_head_view & head, float * out, float * den) const = 0;
};

// what most policies do: the worth of a token is what is summed or drawn for it, a norm, or the product of two of these
// devices can tell it too, see llama-kv-scores-device.cpp
class llama_kv_formula_product : public llama_kv_formula {
public:
    // the largest product goes first
    virtual bool is_negative() const { return false; }

    void score(const llama_kv_head_view & head, float * out, float *) const final {
        bool is_first = true;

        for (const float * x : { head.weights, head.k_norm, head.v_norm }) {
            if (!x) {
                continue;
            }
            if (is_first) {
                std::copy_n(x, head.n, out);
            } else {
                std::transform(out, out + head.n, x, out, std::multiplies<float>());
            }
            is_first = false;
        }
        for (uint32_t i = 0; is_negative() && i < head.n; ++i) {
            out[i] = -out[i];
        }
    }
};
