#pragma once

#include <cstdint>
#include <memory>

// the rule of a policy that scores tokens: which of them a KV head can spare
// a rule is a small value with one formula; protection, scopes, ties and slots are not its business (docs/adding-a-policy.md)

// what is kept per (layer, slot, KV head) for a rule, beside the keys and values
struct llama_kv_rule_needs {
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

    // a number drawn for each token when it is written (in place of weights)
    bool drawn = false;

    // the view is ordered by position (costs a sort per head and choice)
    bool ordered = false;

    // score() gives numerators and denominators, which are summed over the heads that decide together, and over a page
    bool ratio = false;
};

// the kept tokens of one KV head of one layer; protected and recent ones are among them
struct llama_kv_head_view {
    uint32_t n;              // kept tokens
    uint32_t n_old;          // ordered: the first n_old of them are not recent
    uint32_t n_group;        // query heads that attend to this KV head
    const int32_t * pos;     // [n]

    // [n]; nullptr unless needed
    const float * weights;   // or the drawn numbers
    const float * k_norm;    // L2
    const float * v_norm;    // L1 or L2

    // [n, n_embd_k], [n, n_embd_v]; nullptr unless needed
    const float * k_rows;
    const float * v_rows;
    uint32_t n_embd_k;
    uint32_t n_embd_v;
};

class llama_kv_rule {
public:
    virtual ~llama_kv_rule() = default;

    virtual llama_kv_rule_needs needs() const = 0;

    // out[i]: the worth of the i-th kept token, higher is kept; of equals the oldest goes first
    // den[i]: only if needs().ratio, else nullptr
    // called for several heads at once, from several threads
    virtual void score(const llama_kv_head_view & head, float * out, float * den) const = 0;
};
