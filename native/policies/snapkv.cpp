#include "llama-kv-policy-registry.h"

#include <algorithm>

namespace {

// SnapKV (Li et al. 2024, arXiv 2404.14469, section 4): the attention weights of the last queries, the observation window, averaged
//   over neighbouring tokens, so that what surrounds an important token stays with it; kernel 5 and window 32 as in the authors' code
// zeros beyond the ends count in the average, as in PyTorch's avg_pool1d; grouped queries: summed over the query heads of a KV head
class formula_snapkv : public llama_kv_formula {
public:
    llama_kv_formula_needs needs() const override {
        llama_kv_formula_needs res;
        res.positive = true;
        res.weights = true;
        res.window  = (uint32_t) window;
        res.ordered = true;
        return res;
    }

    std::vector<llama_kv_formula_param> params() override {
        return {
            { "window", llama_kv_formula_param::COUNT, &window, 32, 1, 256, "last queries whose attention weights count" },
            { "kernel", llama_kv_formula_param::ODD,   &kernel,  5, 1,  63, "neighbouring tokens that are averaged" },
        };
    }

    void score(const llama_kv_head_view & head, float * out, float *) const override {
        const uint32_t n = head.n_old;
        const uint32_t r = (uint32_t) kernel/2;

        for (uint32_t i = 0; i < n; ++i) {
            const uint32_t j0 = i - std::min(i, r);
            const uint32_t j1 = std::min(n, i + r + 1);

            float sum = 0.0f;
            for (uint32_t j = j0; j < j1; ++j) {
                sum += head.weights[j];
            }

            out[i] = sum/(float) kernel;
        }

        std::fill(out + n, out + head.n, 0.0f);
    }

private:
    double window = 32;
    double kernel = 5;
};

}

std::unique_ptr<llama_kv_formula> llama_kv_formula_snapkv() {
    return std::make_unique<formula_snapkv>();
}
