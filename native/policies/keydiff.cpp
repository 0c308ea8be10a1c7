#include "llama-kv-policy-registry.h"

#include <cmath>
#include <vector>

namespace {

// KeyDiff (Park et al. 2025, arXiv 2504.15364): the key that points closest to the mean direction of all kept keys goes first, by the
//   cosine with the mean of the normalised keys; keys as they are stored, rotated to where they stand
// there is one key per KV head and no query is involved, so grouped queries change nothing
class formula_keydiff : public llama_kv_formula {
public:
    llama_kv_formula_needs needs() const override {
        llama_kv_formula_needs res;
        res.k_rows = true;
        return res;
    }

    void score(const llama_kv_head_view & head, float * out, float *) const override {
        const uint32_t n_embd = head.n_embd_k;

        std::vector<double> sum(n_embd, 0.0);
        for (uint32_t i = 0; i < head.n; ++i) {
            const float * k = head.k_rows + (size_t) i*n_embd;

            out[i] = inverse(std::sqrt(llama_kv_dot(k, k, n_embd)));
            for (uint32_t c = 0; c < n_embd; ++c) {
                sum[c] += k[c]*out[i];
            }
        }

        // the cosine does not depend on the length of the mean
        std::vector<float> anchor(sum.begin(), sum.end());
        const float scale = inverse(std::sqrt(llama_kv_dot(anchor.data(), anchor.data(), n_embd)));

        for (uint32_t i = 0; i < head.n; ++i) {
            out[i] *= -scale*llama_kv_dot(head.k_rows + (size_t) i*n_embd, anchor.data(), n_embd);
        }
    }

private:
    // a key of zeros has no direction: its cosine is 0
    static float inverse(float x) { return x > 0.0f ? 1.0f/x : 0.0f; }

};

}

std::unique_ptr<llama_kv_formula> llama_kv_formula_keydiff() {
    return std::make_unique<formula_keydiff>();
}
