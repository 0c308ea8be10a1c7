#include "llama-kv-rules.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace {

// R-KV (Cai et al. 2025, arXiv 2505.24133, section 3): 0.1*importance - 0.9*redundancy, over the tokens that are not recent. Importance: the
//   weights of the last 8 queries, max-pooled (kernel 7). Redundancy: softmax of a key's mean cosine with the others, of which each
//   key leaves out its newest similar one (cosine > 0.5), so that of several copies the newest stays
// grouped queries: the mean over the query heads, where the authors' code takes the largest logit of the group
class rule_rkv : public llama_kv_rule {
public:
    static constexpr uint32_t window = 8;
    static constexpr uint32_t reach  = 3; // kernel/2

    llama_kv_rule_needs needs() const override {
        llama_kv_rule_needs res;
        res.weights = true;
        res.window  = window;
        res.k_rows  = true;
        res.ordered = true;
        return res;
    }

    void score(const llama_kv_head_view & head, float * out, float *) const override {
        const uint32_t n = head.n_old;
        const uint32_t d = (head.n_embd_k + 7)/8*8; // rows are padded for dot()

        std::vector<float>  unit((size_t) n*d, 0.0f); // [n, d] normalised keys
        std::vector<double> sum(d, 0.0);
        for (uint32_t i = 0; i < n; ++i) {
            float * u = unit.data() + (size_t) i*d;

            std::copy_n(head.k_rows + (size_t) i*head.n_embd_k, head.n_embd_k, u);

            const float norm = std::sqrt(dot(u, u, d));
            for (uint32_t c = 0; c < d && norm > 0.0f; ++c) {
                u[c]   /= norm;
                sum[c] += u[c];
            }
        }
        const std::vector<float> total(sum.begin(), sum.end());

        std::vector<double> cosines(n, 0.0); // of each key: the sum of its cosines with the others
        for (uint32_t i = 0; i < n; ++i) {
            const float * u = unit.data() + (size_t) i*d;

            cosines[i] += dot(u, total.data(), d) - dot(u, u, d);

            for (uint32_t j = n; j-- > 0; ) {
                const float x = j == i ? 0.0f : dot(u, unit.data() + (size_t) j*d, d);
                if (x > 0.5f) {
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

            out[i] = (float) (0.1*best/(window*head.n_group) - 0.9*std::exp(cosines[i]/n)/norm);
        }

        std::fill(out + n, out + head.n, 0.0f);
    }

private:
    // n: a multiple of 8; sums of their own, so that the compiler can vectorise
    static float dot(const float * a, const float * b, uint32_t n) {
        float sum[8] = {};
        for (uint32_t c = 0; c < n; c += 8) {
            for (uint32_t l = 0; l < 8; ++l) {
                sum[l] += a[c + l]*b[c + l];
            }
        }
        return ((sum[0] + sum[4]) + (sum[1] + sum[5])) + ((sum[2] + sum[6]) + (sum[3] + sum[7]));
    }
};

}

std::unique_ptr<llama_kv_rule> llama_kv_rule_rkv() {
    return std::make_unique<rule_rkv>();
}
