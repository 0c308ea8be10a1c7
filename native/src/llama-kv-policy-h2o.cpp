#include "llama-kv-rules.h"

namespace {

// H2O, heavy hitters (Zhang et al. 2023, arXiv 2306.14048, algorithm 1): the accumulated attention weight of a token, not
//   normalised by its age, as in the authors' code; summed over the query heads of a KV head where there are several
class rule_h2o : public llama_kv_rule {
public:
    llama_kv_rule_needs needs() const override {
        llama_kv_rule_needs res;
        res.weights = true;
        return res;
    }

    void score(const llama_kv_head_view & head, float * out, float *) const override {
        for (uint32_t i = 0; i < head.n; ++i) {
            out[i] = head.weights[i];
        }
    }
};

}

std::unique_ptr<llama_kv_rule> llama_kv_rule_h2o() {
    return std::make_unique<rule_h2o>();
}
