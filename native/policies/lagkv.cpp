#include "llama-kv-policy-registry.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace {

// LagKV (Liang et al. 2025, arXiv 2504.04704, section 3): what follows the sinks is cut into partitions of `lag` tokens, and keys and
//   values of each are normalised, channel by channel, by the least and the largest of the next partition. A token is worth the softmax,
//   over its partition, of the standard deviation of its normalised channels; the mean of that of keys and of values. What has no
//   complete partition behind it is kept
// no query is involved, so grouped queries change nothing
class formula_lagkv : public llama_kv_formula {
public:
    llama_kv_formula_needs needs() const override {
        llama_kv_formula_needs res;
        res.positive = true;
        res.k_unrotated = true;
        res.v_rows      = true;
        res.ordered     = true;
        return res;
    }

    std::vector<llama_kv_formula_param> params() override {
        return {
            { "lag",   llama_kv_formula_param::COUNT, &lag,   128, 1, 4096, "tokens of a partition; at most a quarter of what follows the sinks" },
            { "cross", llama_kv_formula_param::COUNT, &cross, 0,   0,    1, "1: partitions compete; 0: each keeps its best, by ranks" },
        };
    }

    void score(const llama_kv_head_view & head, float * out, float *) const override {
        const uint32_t first = std::min(head.n_sinks, head.n);
        const uint32_t rest  = head.n - first;
        const uint32_t n     = std::min((uint32_t) lag, std::max(1u, rest/4));
        const uint32_t n_all = rest/n; // partitions

        std::fill(out, out + head.n, (float) n);

        std::vector<double>   worth(n);
        std::vector<uint32_t> order(n);

        for (uint32_t i = 0; i + 1 < n_all; ++i) {
            const uint32_t i0 = first + i*n;

            std::fill(worth.begin(), worth.end(), 0.0);
            add(head.k_rows, head.n_embd_k, i0, n, worth);
            add(head.v_rows, head.n_embd_v, i0, n, worth);

            for (uint32_t j = 0; j < n; ++j) {
                order[j] = j;
            }
            std::sort(order.begin(), order.end(), [&](uint32_t a, uint32_t b) { return worth[a] != worth[b] ? worth[a] < worth[b] : a < b; });

            for (uint32_t j = 0; j < n; ++j) {
                out[i0 + order[j]] = cross == 1 ? (float) worth[order[j]] : (float) j; // whole numbers, so that the sums of heads are exact
            }
        }
    }

private:
    // half the softmax, over n tokens from i0 on, of what their channels vary by
    static void add(const float * rows, uint32_t n_embd, uint32_t i0, uint32_t n, std::vector<double> & worth) {
        std::vector<float> low (n_embd, INFINITY);
        std::vector<float> high(n_embd, -INFINITY);

        for (uint32_t j = i0 + n; j < i0 + 2*n; ++j) {
            for (uint32_t c = 0; c < n_embd; ++c) {
                low [c] = std::min(low [c], rows[(size_t) j*n_embd + c]);
                high[c] = std::max(high[c], rows[(size_t) j*n_embd + c]);
            }
        }

        std::vector<double> dev(n);
        for (uint32_t j = 0; j < n; ++j) {
            double sum = 0.0;
            double sq  = 0.0;
            for (uint32_t c = 0; c < n_embd; ++c) {
                const double range = (double) high[c] - low[c];
                const double x     = range > 0.0 ? (rows[(size_t) (i0 + j)*n_embd + c] - (double) low[c])/range : 0.0; // a channel without a range says nothing
                sum += x;
                sq  += x*x;
            }
            dev[j] = std::sqrt(std::max(0.0, sq - sum*sum/n_embd)/std::max(1u, n_embd - 1));
        }

        const double max = *std::max_element(dev.begin(), dev.end());

        double norm = 0.0;
        for (auto & x : dev) {
            x     = std::exp(x - max);
            norm += x;
        }
        for (uint32_t j = 0; j < n; ++j) {
            worth[j] += 0.5*dev[j]/norm;
        }
    }

    double lag   = 128;
    double cross = 0;
};

}

std::unique_ptr<llama_kv_formula> llama_kv_formula_lagkv() {
    return std::make_unique<formula_lagkv>();
}
