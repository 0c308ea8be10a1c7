// the score formulas for a caller without C++: tests/support/formula_scores.py compares them with those in numpy
// built as a shared library with the registry and the formulas; needs neither ggml nor llama.cpp

#include "llama-kv-policy-spec.h"

#include <algorithm>
#include <cmath>
#include <type_traits>

#ifdef _WIN32
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

// text: of a policy; pos: [n] ascending; weights: [n], or the numbers drawn; k: [n, n_embd_k], v: [n, n_embd_v]; out, den: [n]
// returns 1 if den was filled; what the formula has not asked for is not in its view
extern "C" EXPORT int formula_scores(const char * text, uint32_t n, uint32_t n_old, uint32_t n_group, const int32_t * pos, const float * weights,
        const float * k, const float * v, uint32_t n_embd_k, uint32_t n_embd_v, float * out, float * den) {
    const auto formula  = llama_kv_policy_parse(text).make_formula();
    const auto needs = formula->needs();

    // a formula that has not asked for an order gets the newest token first
    const auto place = [&](uint32_t i) { return needs.ordered ? i : n - 1 - i; };

    const auto placed = [&](const auto * rows, uint32_t n_embd) {
        std::vector<std::decay_t<decltype(*rows)>> res((size_t) n*n_embd);
        for (uint32_t i = 0; i < n; ++i) {
            std::copy_n(rows + (size_t) i*n_embd, n_embd, res.begin() + (size_t) place(i)*n_embd);
        }
        return res;
    };
    const auto in_pos     = placed(pos,     1);
    const auto in_weights = placed(weights, 1);
    const auto in_k       = placed(k, n_embd_k);
    const auto in_v       = placed(v, n_embd_v);

    const auto norms = [n](const std::vector<float> & rows, uint32_t n_embd, bool l1) {
        std::vector<float> res(n);
        for (uint32_t i = 0; i < n; ++i) {
            double sum = 0.0;
            for (uint32_t c = 0; c < n_embd; ++c) {
                const double x = rows[(size_t) i*n_embd + c];
                sum += l1 ? std::fabs(x) : x*x;
            }
            res[i] = (float) (l1 ? sum : std::sqrt(sum));
        }
        return res;
    };
    const auto k_norm = norms(in_k, n_embd_k, false);
    const auto v_norm = norms(in_v, n_embd_v, needs.v_l1);

    llama_kv_head_view view = {};

    view.n       = n;
    view.n_sinks = n/8;
    view.n_old   = n_old;
    view.pos_min = INT32_MIN;
    view.pos_max = n_old > 0 ? pos[n_old - 1] : INT32_MIN;
    view.n_group = n_group;
    view.pos     = in_pos.data();

    view.weights = needs.weights || needs.drawn ? in_weights.data() : nullptr;
    view.given   = needs.given                  ? in_weights.data() : nullptr;
    view.k_norm  = needs.k_l2                   ? k_norm.data()     : nullptr;
    view.v_norm  = needs.v_l1 || needs.v_l2     ? v_norm.data()     : nullptr;

    if (needs.k_rows || needs.k_unrotated) {
        view.k_rows   = in_k.data();
        view.n_embd_k = n_embd_k;
    }
    if (needs.v_rows) {
        view.v_rows   = in_v.data();
        view.n_embd_v = n_embd_v;
    }

    std::vector<float> res(n);
    std::vector<float> res_den(n);

    formula->score(view, res.data(), needs.ratio ? res_den.data() : nullptr);

    for (uint32_t i = 0; i < n; ++i) {
        out[i] = res[place(i)];
        den[i] = res_den[place(i)];
    }

    return needs.ratio;
}
