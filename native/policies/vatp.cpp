#include "llama-kv-policy-registry.h"

namespace {

// VATP, value-aware token pruning (Guo et al. 2024, arXiv 2406.12335, the variant on top of H2O): the accumulated attention weight
//   times the L1 norm of the value
// grouped queries: the weight is summed over the query heads that share the value; the paper has one query head per KV head
class formula_vatp : public llama_kv_formula_product {
public:
    llama_kv_formula_needs needs() const override {
        llama_kv_formula_needs res;
        res.positive = true;
        res.weights = true;
        res.v_l1    = true;
        return res;
    }
};

}

std::unique_ptr<llama_kv_formula> llama_kv_formula_vatp() {
    return std::make_unique<formula_vatp>();
}
