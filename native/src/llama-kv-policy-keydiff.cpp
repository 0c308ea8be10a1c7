#include "llama-kv-rules.h"

#include <cmath>
#include <vector>

namespace {

// KeyDiff (Park et al. 2025, arXiv 2504.15364): the key that points closest to the mean direction of all kept keys goes first, by the
//   cosine with the mean of the normalised keys; keys as they are stored, rotated to where they stand
// there is one key per KV head and no query is involved, so grouped queries change nothing
class rule_keydiff : public llama_kv_rule {
public:
    llama_kv_rule_needs needs() const override {
        llama_kv_rule_needs res;
        res.k_rows = true;
        return res;
    }

    void score(const llama_kv_head_view & head, float * out, float *) const override {
        const uint32_t n_embd = head.n_embd_k;

        std::vector<double> sum(n_embd, 0.0);
        for (uint32_t i = 0; i < head.n; ++i) {
            const float * k = head.k_rows + (size_t) i*n_embd;

            out[i] = inverse(std::sqrt(dot(k, k, n_embd)));
            for (uint32_t c = 0; c < n_embd; ++c) {
                sum[c] += k[c]*out[i];
            }
        }

        // the cosine does not depend on the length of the mean
        std::vector<float> anchor(sum.begin(), sum.end());
        const float scale = inverse(std::sqrt(dot(anchor.data(), anchor.data(), n_embd)));

        for (uint32_t i = 0; i < head.n; ++i) {
            out[i] *= -scale*dot(head.k_rows + (size_t) i*n_embd, anchor.data(), n_embd);
        }
    }

private:
    // a key of zeros has no direction: its cosine is 0
    static float inverse(float x) { return x > 0.0f ? 1.0f/x : 0.0f; }

    static float dot(const float * a, const float * b, uint32_t n) {
        float sum[8] = {}; // independent, so that the compiler can vectorise

        uint32_t c = 0;
        for (; c + 8 <= n; c += 8) {
            for (uint32_t l = 0; l < 8; ++l) {
                sum[l] += a[c + l]*b[c + l];
            }
        }
        for (; c < n; ++c) {
            sum[0] += a[c]*b[c];
        }

        return ((sum[0] + sum[4]) + (sum[1] + sum[5])) + ((sum[2] + sum[6]) + (sum[3] + sum[7]));
    }
};

}

std::unique_ptr<llama_kv_rule> llama_kv_rule_keydiff() {
    return std::make_unique<rule_keydiff>();
}
