#include "llama-kv-policy-registry.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace {

// R-KV (Cai et al. 2025, arXiv 2505.24133, section 3): 0.1*importance - 0.9*redundancy, over the tokens that are not recent. Importance: the
//   weights of the last 8 queries, max-pooled (kernel 7). Redundancy: softmax of a key's mean cosine with the others, of which each
//   key leaves out its newest similar one (cosine > 0.5), so that of several copies the newest stays
// grouped queries: the mean over the query heads, where the authors' code takes the largest logit of the group
class formula_rkv : public llama_kv_formula {
public:
    llama_kv_formula_needs needs() const override {
        llama_kv_formula_needs res;
        res.weights = true;
        res.window  = (uint32_t) window;
        res.k_rows  = true;
        res.ordered = true;
        return res;
    }

    std::vector<llama_kv_formula_param> params() override {
        return {
            { "window",    llama_kv_formula_param::COUNT, &window,    8,   1,   256,   "last queries whose attention weights count" },
            { "kernel",    llama_kv_formula_param::ODD,   &kernel,    7,   1,    63,   "neighbouring tokens of which the largest weight counts" },
            { "lambda",    llama_kv_formula_param::REAL,  &lambda,    0.1, 0.0,   1.0, "share of the importance; the rest is redundancy" },
            { "threshold", llama_kv_formula_param::REAL,  &threshold, 0.5, -1.0,  1.0, "cosine from which on two keys are alike" },
        };
    }

    void score(const llama_kv_head_view & head, float * out, float *) const override {
        const uint32_t n     = head.n_old;
        const uint32_t reach = (uint32_t) kernel/2;
        const uint32_t d = (head.n_embd_k + 7)/8*8; // rows are padded for llama_kv_dot()

        std::vector<float>  unit((size_t) n*d, 0.0f); // [n, d] normalised keys
        std::vector<double> sum(d, 0.0);
        for (uint32_t i = 0; i < n; ++i) {
            float * u = unit.data() + (size_t) i*d;

            std::copy_n(head.k_rows + (size_t) i*head.n_embd_k, head.n_embd_k, u);

            const float norm = std::sqrt(llama_kv_dot(u, u, d));
            for (uint32_t c = 0; c < d && norm > 0.0f; ++c) {
                u[c]   /= norm;
                sum[c] += u[c];
            }
        }
        const std::vector<float> total(sum.begin(), sum.end());

        std::vector<double> cosines(n, 0.0); // of each key: the sum of its cosines with the others
        for (uint32_t i = 0; i < n; ++i) {
            const float * u = unit.data() + (size_t) i*d;

            cosines[i] += llama_kv_dot(u, total.data(), d) - llama_kv_dot(u, u, d);

            for (uint32_t j = n; j-- > 0; ) {
                const float x = j == i ? 0.0f : llama_kv_dot(u, unit.data() + (size_t) j*d, d);
                if (x > (float) threshold) {
                    cosines[j] -= x;
                    break;
                }
            }
        }

        double norm = 0.0;
        for (uint32_t i = 0; i < n; ++i) {
            norm += std::exp(cosines[i]/n);
        }

        for (uint32_t i = 0; i < n; ++i) {
            float best = head.weights[i];
            for (uint32_t j = i - std::min(i, reach); j < std::min(n, i + reach + 1); ++j) {
                best = std::max(best, head.weights[j]);
            }

            out[i] = (float) (lambda*best/(window*head.n_group) - (1.0 - lambda)*std::exp(cosines[i]/n)/norm);
        }

        std::fill(out + n, out + head.n, 0.0f);
    }

private:
    double window    = 8;
    double kernel    = 7;
    double lambda    = 0.1;
    double threshold = 0.5;

};

}

std::unique_ptr<llama_kv_formula> llama_kv_formula_rkv() {
    return std::make_unique<formula_rkv>();
}
