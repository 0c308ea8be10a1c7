#include "llama-kv-policy-registry.h"

namespace {

// scores of the caller's: of a gate that was trained to know which tokens will be needed (TokenButler, arXiv 2503.07518; Dynamic
//   Context Pruning, 2305.15805; Neural Attention Search, 2502.13251), or of an experiment
// one per KV head, which knows nothing of queries, so grouped queries change nothing
class formula_external : public llama_kv_formula {
public:
    llama_kv_formula_needs needs() const override {
        llama_kv_formula_needs res;
        res.given = true;
        return res;
    }

    std::vector<llama_kv_formula_param> params() override {
        return { { "unscored", llama_kv_formula_param::REAL, &unscored, 0.0, -1e30, 1e30, "worth of a token to a KV head for which no score was set" } };
    }

    void score(const llama_kv_head_view & head, float * out, float *) const override {
        for (uint32_t i = 0; i < head.n; ++i) {
            out[i] = head.given[i] == head.given[i] ? head.given[i] : (float) unscored; // NaN: not set
        }
    }

private:
    double unscored = 0.0;
};

}

std::unique_ptr<llama_kv_formula> llama_kv_formula_external() {
    return std::make_unique<formula_external>();
}
