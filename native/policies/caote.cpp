#include "llama-kv-policy-registry.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace {

// CAOTE (Goel et al. 2025, arXiv 2504.14051, section 3): how far the attention output X moves when a token goes, which is
//   a/(1 - a)*||X - v||; FastCAOTE takes the mean of the kept values for X. Here on top of H2O: a is the accumulated weight, over its sum
// grouped queries: a is summed over the query heads of a KV head, so X is the output for their mean weights
class formula_caote : public llama_kv_formula {
public:
    formula_caote(bool fast) : fast(fast) {}

    llama_kv_formula_needs needs() const override {
        llama_kv_formula_needs res;
        res.positive = true;
        res.weights = true;
        res.v_rows  = true;
        return res;
    }

    void score(const llama_kv_head_view & head, float * out, float *) const override {
        const uint32_t n_embd = head.n_embd_v;

        double total = 0.0;
        for (uint32_t i = 0; i < head.n; ++i) {
            total += head.weights[i];
        }
        total = total > 0.0 ? total : 1.0; // no query yet

        std::vector<double> x(n_embd, 0.0);
        for (uint32_t i = 0; i < head.n; ++i) {
            const float * v = head.v_rows + (size_t) i*n_embd;
            const double  a = fast ? 1.0/head.n : head.weights[i]/total;

            for (uint32_t c = 0; c < n_embd; ++c) {
                x[c] += a*v[c];
            }
        }

        for (uint32_t i = 0; i < head.n; ++i) {
            const double a = head.weights[i]/total;

            // in double: X is close to v where a is close to 1
            out[i] = (float) (a/std::max(1.0 - a, 1e-6)*distance(x.data(), head.v_rows + (size_t) i*n_embd, n_embd));
        }
    }

private:
    static double distance(const double * x, const float * v, uint32_t n) {
        double sum[4] = {}; // independent, so that the compiler can vectorise

        uint32_t c = 0;
        for (; c + 4 <= n; c += 4) {
            for (uint32_t l = 0; l < 4; ++l) {
                sum[l] += (x[c + l] - v[c + l])*(x[c + l] - v[c + l]);
            }
        }
        for (; c < n; ++c) {
            sum[0] += (x[c] - v[c])*(x[c] - v[c]);
        }

        return std::sqrt((sum[0] + sum[1]) + (sum[2] + sum[3]));
    }

    const bool fast;
};

}

std::unique_ptr<llama_kv_formula> llama_kv_formula_caote() {
    return std::make_unique<formula_caote>(false);
}

std::unique_ptr<llama_kv_formula> llama_kv_formula_fastcaote() {
    return std::make_unique<formula_caote>(true);
}
