#include "llama-kv-policy-registry.h"

namespace {

// A2SF (Jo and Shin 2024, arXiv 2407.20485): accumulated attention weights of which each later query forgets a share, so that old
//   tokens do not win by their age alone; 1 would be H2O, 0 TOVA per head. 0.95 is the example in the authors' code
// grouped queries: summed over the query heads of a KV head, as there
class formula_a2sf : public llama_kv_formula_product {
public:
    llama_kv_formula_needs needs() const override {
        llama_kv_formula_needs res;
        res.positive = true;
        res.weights = true;
        res.decay   = (float) decay;
        return res;
    }

    std::vector<llama_kv_formula_param> params() override {
        return { { "decay", llama_kv_formula_param::REAL, &decay, 0.95, 0.0, 1.0, "each query multiplies the sum of the earlier ones by this; 1 is H2O, 0 is TOVA" } };
    }

private:
    double decay = 0.95;
};

}

std::unique_ptr<llama_kv_formula> llama_kv_formula_a2sf() {
    return std::make_unique<formula_a2sf>();
}
