// policies of the tests alone, in place of the registry: what no policy of the product asks of a formula yet
// built as a shared library that is loaded before libllama (tests/native/test_adding_a_policy.py), whose calls it takes over; the same
//   formulas in numpy are in tests/native/toy_policies.py

#include "llama-kv-policy-spec.h"

#include <cmath>
#include <cstdlib>

namespace {

// the key's component along a direction, a fixed one and that of the protected keys, which a rotation changes
class toy_axis : public llama_kv_formula {
public:
    explicit toy_axis(bool unrotated) : unrotated(unrotated) {}

    llama_kv_formula_needs needs() const override {
        llama_kv_formula_needs res;
        res.k_rows      = !unrotated;
        res.k_unrotated = unrotated;
        return res;
    }

    void score(const llama_kv_head_view & head, float * out, float *) const override {
        std::vector<float> direction(head.n_embd_k);
        for (uint32_t c = 0; c < head.n_embd_k; ++c) {
            direction[c] = std::cos((float) c);
            for (uint32_t i = 0; i < head.n; ++i) {
                direction[c] += head.pos[i] < head.pos_min ? head.k_rows[(size_t) i*head.n_embd_k + c] : 0.0f;
            }
        }
        for (uint32_t i = 0; i < head.n; ++i) {
            out[i] = llama_kv_dot(head.k_rows + (size_t) i*head.n_embd_k, direction.data(), head.n_embd_k);
        }
    }

private:
    const bool unrotated;
};

// the more choices a token has outlived, the sooner it goes: the oldest one, if what it remembers follows it
class toy_state : public llama_kv_formula {
public:
    llama_kv_formula_needs needs() const override {
        llama_kv_formula_needs res;
        res.state = true;
        return res;
    }

    void score(const llama_kv_head_view & head, float * out, float *) const override {
        for (uint32_t i = 0; i < head.n; ++i) {
            out[i] = -(++head.state[i]);
        }
    }
};

// what stands in the middle of the tokens that may go, goes first
class toy_middle : public llama_kv_formula {
public:
    llama_kv_formula_needs needs() const override {
        llama_kv_formula_needs res;
        res.ordered = true;
        return res;
    }

    void score(const llama_kv_head_view & head, float * out, float *) const override {
        const int n_first = (int) (head.n_sinks + head.n_pinned);

        for (int i = 0; i < (int) head.n; ++i) {
            const bool may_go = head.pos[i] >= head.pos_min && head.pos[i] <= head.pos_max;

            // the counts and the range say the same
            if (may_go != (i >= n_first && i < (int) head.n_old)) {
                abort();
            }
            out[i] = (float) std::abs(2*i - (n_first + (int) head.n_old - 1));
        }
    }
};

// norms in pages, which are no ratio
class toy_pages : public llama_kv_formula {
public:
    llama_kv_formula_needs needs() const override {
        llama_kv_formula_needs res;
        res.v_l2      = true;
        res.page_size = (uint32_t) page_size;
        return res;
    }

    std::vector<llama_kv_formula_param> params() override {
        return { { "page_size", llama_kv_formula_param::COUNT, &page_size, 8, 1, 64, "tokens of a page" } };
    }

    void score(const llama_kv_head_view & head, float * out, float *) const override {
        std::copy_n(head.v_norm, head.n, out);
    }

private:
    double page_size = 8;
};

std::unique_ptr<llama_kv_formula> make_plain_axis () { return std::make_unique<toy_axis>(true); }
std::unique_ptr<llama_kv_formula> make_stored_axis() { return std::make_unique<toy_axis>(false); }
std::unique_ptr<llama_kv_formula> make_state      () { return std::make_unique<toy_state>(); }
std::unique_ptr<llama_kv_formula> make_middle     () { return std::make_unique<toy_middle>(); }
std::unique_ptr<llama_kv_formula> make_pages      () { return std::make_unique<toy_pages>(); }

}

const std::vector<llama_kv_policy_desc> & llama_kv_policy_registry() {
    using names = std::vector<const char *>;

    const names scopes    = { "head", "layer", "token" };
    const names positions = { "auto", "true", "cache" };
    const names updates   = { "inplace", "gather" };

    static const std::vector<llama_kv_policy_desc> registry = {
        { "plain_axis",  scopes, positions, updates, true, nullptr, make_plain_axis },
        { "stored_axis", scopes, positions, updates, true, nullptr, make_stored_axis },
        { "state",       scopes, positions, updates, true, nullptr, make_state, 1, false, /*.recent =*/ 11 },
        { "middle",      scopes, positions, updates, true, nullptr, make_middle },
        { "pages",       scopes, positions, updates, true, nullptr, make_pages },
    };

    return registry;
}
