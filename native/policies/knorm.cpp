#include "llama-kv-policy-registry.h"

namespace {

// Knorm (Devoto et al. 2024, arXiv 2406.11430): tokens with a small key get the most attention, so the largest L2 norm goes first
// the norm does not change with the rotation; there is one key per KV head, so grouped queries change nothing
class formula_knorm : public llama_kv_formula_product {
public:
    llama_kv_formula_needs needs() const override {
        llama_kv_formula_needs res;
        res.k_l2 = true;
        return res;
    }

    bool is_negative() const override { return true; }
};

}

std::unique_ptr<llama_kv_formula> llama_kv_formula_knorm() {
    return std::make_unique<formula_knorm>();
}
