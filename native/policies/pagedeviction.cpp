#include "llama-kv-policy-registry.h"

namespace {

// PagedEviction (Chitty-Venkata et al. 2025, arXiv 2509.04377): the L2 norm of the value over that of the key
// the norms are summed over the KV heads that decide together, and over a page, before they are divided; no query is involved
// pages of 16 tokens, the blocks of vLLM, which the authors build on
class formula_pagedeviction : public llama_kv_formula {
public:
    llama_kv_formula_needs needs() const override {
        llama_kv_formula_needs res;
        res.k_l2  = true;
        res.v_l2  = true;
        res.ratio = true;
        res.page_size = (uint32_t) page_size;
        return res;
    }

    std::vector<llama_kv_formula_param> params() override {
        return { { "page_size", llama_kv_formula_param::COUNT, &page_size, 16, 1, 65536, "tokens of a page, which goes whole; the budget is a multiple of it" } };
    }

    void score(const llama_kv_head_view & head, float * out, float * den) const override {
        for (uint32_t i = 0; i < head.n; ++i) {
            out[i] = head.v_norm[i];
            den[i] = head.k_norm[i];
        }
    }

private:
    double page_size = 16;
};

}

std::unique_ptr<llama_kv_formula> llama_kv_formula_pagedeviction() {
    return std::make_unique<formula_pagedeviction>();
}
