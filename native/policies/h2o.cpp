#include "llama-kv-policy-registry.h"

namespace {

// H2O, heavy hitters (Zhang et al. 2023, arXiv 2306.14048, algorithm 1): the accumulated attention weight of a token, not
//   normalised by its age, as in the authors' code; summed over the query heads of a KV head where there are several
class formula_h2o : public llama_kv_formula_product {
public:
    llama_kv_formula_needs needs() const override {
        llama_kv_formula_needs res;
        res.positive = true;
        res.weights = true;
        return res;
    }
};

}

std::unique_ptr<llama_kv_formula> llama_kv_formula_h2o() {
    return std::make_unique<formula_h2o>();
}
