#include "llama-kv-policy-registry.h"

namespace {

// Knorm (Devoto et al. 2024, arXiv 2406.11430): tokens with a small key get the most attention, so the largest L2 norm goes first
// the norm does not change with the rotation; there is one key per KV head, so grouped queries change nothing
class formula_knorm : public llama_kv_formula {
public:
    llama_kv_formula_needs needs() const override {
        llama_kv_formula_needs res;
        res.k_l2 = true;
        return res;
    }

    void score(const llama_kv_head_view & head, float * out, float *) const override {
        for (uint32_t i = 0; i < head.n; ++i) {
            out[i] = -head.k_norm[i];
        }
    }
};

}

std::unique_ptr<llama_kv_formula> llama_kv_formula_knorm() {
    return std::make_unique<formula_knorm>();
}
