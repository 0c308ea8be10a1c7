#include "llama-kv-policy-registry.h"

namespace {

// `random` where each layer or KV head draws for itself: a uniform sample of what has been read, as llama-kv-victim-random.cpp keeps
//   one for all of them (reservoir sampling: Vitter 1985, algorithm R, has the same distribution)
// the number of a token in a unit is drawn when it is written; the lowest one goes
class formula_random : public llama_kv_formula_product {
public:
    llama_kv_formula_needs needs() const override {
        llama_kv_formula_needs res;
        res.drawn = true;
        return res;
    }
};

}

std::unique_ptr<llama_kv_formula> llama_kv_formula_random() {
    return std::make_unique<formula_random>();
}
