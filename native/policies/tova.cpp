#include "llama-kv-policy-registry.h"

namespace {

// TOVA (Oren et al. 2024, arXiv 2401.06104, section 3): the attention weight that the newest query gives to a token
// its authors take the mean over the query heads of a layer, which orders tokens as the sum does; hence the default scope `layer`
class formula_tova : public llama_kv_formula_product {
public:
    llama_kv_formula_needs needs() const override {
        llama_kv_formula_needs res;
        res.positive = true;
        res.weights = true;
        res.decay   = 0.0f;
        return res;
    }
};

}

std::unique_ptr<llama_kv_formula> llama_kv_formula_tova() {
    return std::make_unique<formula_tova>();
}
