// the formulas of the score policies: what can be worked out by hand, among it where a formula has nothing to go by, what each asks
//   for, and, under ASan and UBSan, heads of every shape; tests/support/formula_scores.py compares them with the formulas in numpy
// no ggml, no llama.cpp

#include "llama-kv-policy-registry.h"
#include "test-check.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <limits>
#include <random>
#include <vector>

using row   = std::vector<double>;
using table = std::vector<row>;

static const float nan_f = std::numeric_limits<float>::quiet_NaN();

// the kept tokens of one KV head, in the order of the view; what a formula has not asked for is not in its view
struct input {
    uint32_t n       = 0;
    uint32_t n_old   = 0;
    uint32_t n_group = 1;

    std::vector<int32_t> pos;

    row weights; // or drawn numbers, or those of a caller
    row k_norm;
    row v_norm;

    table k; // [n, n_embd_k]
    table v; // [n, n_embd_v]
};

static row score(const llama_kv_formula & formula, const input & in) {
    const auto needs = formula.needs();

    const auto as_float = [](const row & values) { return std::vector<float>(values.begin(), values.end()); };

    const auto flat = [](const table & rows) {
        std::vector<float> res;
        for (const auto & r : rows) {
            res.insert(res.end(), r.begin(), r.end());
        }
        return res;
    };

    const auto weights = as_float(in.weights);
    const auto k_norm  = as_float(in.k_norm);
    const auto v_norm  = as_float(in.v_norm);
    const auto k       = flat(in.k);
    const auto v       = flat(in.v);

    llama_kv_head_view view = {};

    view.n       = in.n;
    view.n_old   = needs.ordered ? in.n_old : in.n;
    view.pos     = in.pos.data();
    view.n_group = in.n_group;

    view.weights = needs.weights || needs.drawn ? weights.data() : nullptr;
    view.given   = needs.given                  ? weights.data() : nullptr;
    view.k_norm  = needs.k_l2                   ? k_norm.data()  : nullptr;
    view.v_norm  = needs.v_l1 || needs.v_l2     ? v_norm.data()  : nullptr;

    if (needs.k_rows || needs.k_unrotated) {
        view.k_rows   = k.data();
        view.n_embd_k = in.n ? (uint32_t) in.k[0].size() : 1;
    }
    if (needs.v_rows) {
        view.v_rows   = v.data();
        view.n_embd_v = in.n ? (uint32_t) in.v[0].size() : 1;
    }

    std::vector<float> out(in.n, nan_f);
    std::vector<float> out_den(needs.ratio ? in.n : 0, nan_f);

    formula.score(view, out.data(), needs.ratio ? out_den.data() : nullptr);

    return row(out.begin(), out.end());
}

// within 2e-5 of the largest value, which is what float32 sums of this length keep
static void compare(const row & got, const row & want, const char * name, const input & in) {
    double scale = 0.0;
    for (const double x : want) {
        scale = std::max(scale, std::abs(x));
    }

    CHECK(got.size() == want.size(), "%s: %zu scores, not %zu", name, got.size(), want.size());
    for (size_t i = 0; i < want.size(); ++i) {
        CHECK(std::abs(got[i] - want[i]) <= 2e-5*scale, "%s: token %zu of %u (%u not recent, group of %u): %.9g, not %.9g",
                name, i, in.n, in.n_old, in.n_group, got[i], want[i]);
    }
}

struct formula_case {
    const char * name;

    std::unique_ptr<llama_kv_formula> (*make)();
    llama_kv_formula_needs needs;
};

static std::vector<formula_case> cases() {
    const auto needs = [](const std::function<void(llama_kv_formula_needs &)> & set) {
        llama_kv_formula_needs res;
        set(res);
        return res;
    };

    using N = llama_kv_formula_needs &;

    return {
        { "h2o",           llama_kv_formula_h2o,           needs([](N x) { x.weights = true; x.positive = true; }) },
        { "random",        llama_kv_formula_random,        needs([](N x) { x.drawn = true; }) },
        { "tova",          llama_kv_formula_tova,          needs([](N x) { x.weights = true; x.positive = true; x.decay = 0.0f; }) },
        { "a2sf",          llama_kv_formula_a2sf,          needs([](N x) { x.weights = true; x.positive = true; x.decay = 0.95f; }) },
        { "snapkv",        llama_kv_formula_snapkv,        needs([](N x) { x.weights = true; x.positive = true; x.window = 32; x.ordered = true; }) },
        { "vatp",          llama_kv_formula_vatp,          needs([](N x) { x.weights = true; x.positive = true; x.v_l1 = true; }) },
        { "caote",         llama_kv_formula_caote,         needs([](N x) { x.weights = true; x.positive = true; x.v_rows = true; }) },
        { "fastcaote",     llama_kv_formula_fastcaote,     needs([](N x) { x.weights = true; x.positive = true; x.v_rows = true; }) },
        { "pagedeviction", llama_kv_formula_pagedeviction, needs([](N x) { x.k_l2 = true; x.v_l2 = true; x.ratio = true; x.page_size = 16; }) },
        { "keydiff",       llama_kv_formula_keydiff,       needs([](N x) { x.k_rows = true; }) },
        { "knorm",         llama_kv_formula_knorm,         needs([](N x) { x.k_l2 = true; }) },
        { "rkv",           llama_kv_formula_rkv,           needs([](N x) { x.weights = true; x.window = 8; x.k_rows = true; x.ordered = true; }) },
        { "lagkv",         llama_kv_formula_lagkv,         needs([](N x) { x.k_unrotated = true; x.v_rows = true; x.ordered = true; x.positive = true; }) },
        { "external",      llama_kv_formula_external,      needs([](N x) { x.given = true; }) },
    };
}

static bool same(const llama_kv_formula_needs & a, const llama_kv_formula_needs & b) {
    return a.weights == b.weights && a.decay == b.decay && a.window == b.window && a.k_l2 == b.k_l2 && a.v_l1 == b.v_l1 && a.v_l2 == b.v_l2 &&
        a.k_rows == b.k_rows && a.v_rows == b.v_rows && a.drawn == b.drawn && a.ordered == b.ordered && a.ratio == b.ratio &&
        a.page_size == b.page_size && a.k_unrotated == b.k_unrotated && a.state == b.state &&
        a.given == b.given && a.positive == b.positive;
}

//
// random inputs
//

// the values that a float can hold, so that both sides compute with the same ones
static double draw(std::mt19937 & rng, double lo, double hi) {
    return (float) (lo + (hi - lo)*(rng()/4294967296.0));
}

static input draw_input(std::mt19937 & rng, uint32_t n, uint32_t n_old, uint32_t n_embd_k, uint32_t n_embd_v, int kind) {
    input in;

    in.n       = n;
    in.n_old   = n_old;
    in.n_group = 1 + rng() % 7;

    // how far the keys point in a common direction: some are similar to each other, all, or none
    const double common = kind == 0 ? 0.5 : kind == 1 ? 2.0 : 0.0;

    for (uint32_t i = 0; i < n; ++i) {
        in.pos.push_back((i ? in.pos.back() : 0) + 1 + (int32_t) (rng() % 5));
        in.weights.push_back(draw(rng, 0.0, 3.0));
        in.k_norm.push_back(draw(rng, 0.1, 9.0));
        in.v_norm.push_back(draw(rng, 0.1, 9.0));
        in.k.emplace_back();
        in.v.emplace_back();
        for (uint32_t c = 0; c < n_embd_k; ++c) {
            in.k[i].push_back(draw(rng, -1.0 + common, 1.0 + common));
        }
        for (uint32_t c = 0; c < n_embd_v; ++c) {
            in.v[i].push_back(draw(rng, -1.0, 1.0));
        }
    }

    // one token has taken nearly all the weight, one has none, and one has a key without direction
    if (kind == 2 && n > 4) {
        in.weights[1] = 1e4;
        in.weights[2] = 0.0;
        in.k[3].assign(n_embd_k, 0.0);
    }

    return in;
}

static void test_random() {
    const auto   all = cases();
    std::mt19937 rng(1);

    for (const uint32_t n : { 1, 2, 3, 5, 8, 33, 150 }) {
        for (const uint32_t n_embd : { 2, 6, 32, 67 }) {
            for (int kind = 0; kind < 3; ++kind) {
                for (const uint32_t n_old : { 0u, n/2, n - n/4, n }) {
                    // K and V may have heads of different size
                    const input in = draw_input(rng, n, n_old, n_embd, n_embd + 4*(rng() % 2), kind);

                    for (const auto & c : all) {
                        for (const double x : score(*c.make(), in)) {
                            CHECK(std::isfinite(x), "%s: %g for a token of %u (%u not recent)", c.name, x, n, n_old);
                        }
                    }
                }
            }
        }
    }
}

//
// what can be worked out by hand
//

static input by_hand(const row & weights, uint32_t n_old, const table & rows) {
    input in;

    in.n       = (uint32_t) weights.size();
    in.n_old   = n_old;
    in.weights = weights;
    in.k_norm  = weights;
    in.v_norm  = row(in.n, 3.0);
    in.k       = rows;
    in.v       = rows;
    for (uint32_t i = 0; i < in.n; ++i) {
        in.pos.push_back((int32_t) i);
    }
    return in;
}

static void test_by_hand() {
    const table axes = { { 1, 0 }, { 1, 0 }, { 2, 0 }, { 0, 5 }, { 9, 9 }, { 9, 9 } };

    const auto check = [&](const char * name, std::unique_ptr<llama_kv_formula> formula, const input & in, const row & want) {
        compare(score(*formula, in), want, name, in);
    };

    {
        const input in = by_hand({ 1, 2, 3, 4, 100, 200 }, 4, axes);

        check("h2o by hand",    llama_kv_formula_h2o(),    in, { 1, 2, 3, 4, 100, 200 });
        check("vatp by hand",   llama_kv_formula_vatp(),   in, { 3, 6, 9, 12, 300, 600 });
        check("knorm by hand",  llama_kv_formula_knorm(),  in, { -1, -2, -3, -4, -100, -200 });
        check("snapkv by hand", llama_kv_formula_snapkv(), in, { 1.2, 2.0, 2.0, 1.8, 0, 0 });

        // the newest of three keys that point the same way has mean cosine 0, the oldest 1/2, the middle one 1/4; the pooled
        //   weight of all four is 4
        const double e = std::exp(0.5) + std::exp(0.25) + 2.0;
        check("rkv by hand", llama_kv_formula_rkv(), in,
                { 0.05 - 0.9*std::exp(0.5)/e, 0.05 - 0.9*std::exp(0.25)/e, 0.05 - 0.9/e, 0.05 - 0.9/e, 0, 0 });
    }
    {
        // shares 1/4, 1/4, 1/2; X = (0.5, 1), the plain mean (2/3, 2/3)
        const input in = by_hand({ 1, 1, 2 }, 3, { { 2, 0 }, { 0, 0 }, { 0, 2 } });

        check("caote by hand",     llama_kv_formula_caote(),     in, { std::sqrt(3.25)/3, std::sqrt(1.25)/3, std::sqrt(1.25) });
        check("fastcaote by hand", llama_kv_formula_fastcaote(), in, { std::sqrt(20.0/9)/3, std::sqrt(8.0/9)/3, std::sqrt(20.0/9) });
    }
    {
        // the mean direction is (2/3, 1/3)
        const input in = by_hand({ 1, 1, 1 }, 3, { { 1, 0 }, { 7, 0 }, { 0, 2 } });

        check("keydiff by hand", llama_kv_formula_keydiff(), in, { -2/std::sqrt(5.0), -2/std::sqrt(5.0), -1/std::sqrt(5.0) });
    }
    {
        // a key of zeros has no direction, and is like no other
        const input in = by_hand({ 1, 1, 1 }, 3, { { 1, 0 }, { 0, 0 }, { 0, 2 } });

        check("keydiff of a key of zeros", llama_kv_formula_keydiff(), in, { -std::sqrt(0.5), 0, -std::sqrt(0.5) });
        check("rkv of a key of zeros",     llama_kv_formula_rkv(),     in, { 0.1/8 - 0.3, 0.1/8 - 0.3, 0.1/8 - 0.3 });
    }
    {
        // partitions of two; of each, the token whose channels differ less in units of the next one's ranges is worth 0, and the
        //   last one has no next one
        const input in = by_hand(row(8, 1.0), 8, { { 0, 0 }, { 0, 1 }, { 0, 0 }, { 1, 1 }, { 2, 1 }, { 0, 0 }, { 0, 0 }, { 1, 1 } });

        check("lagkv by hand", llama_kv_formula_lagkv(), in, { 0, 1, 0, 1, 1, 0, 2, 2 });
    }
    {
        const input in = by_hand({ 0.5, nan_f, -2 }, 3, { { 1, 0 }, { 7, 0 }, { 0, 2 } });

        check("external by hand", llama_kv_formula_external(), in, { 0.5, 0, -2 });
    }
    {
        // no query has been seen: every token is worth the same
        const input in = by_hand({ 0, 0, 0 }, 3, { { 1, 0 }, { 7, 0 }, { 0, 2 } });

        check("caote without weights",     llama_kv_formula_caote(),     in, { 0, 0, 0 });
        check("fastcaote without weights", llama_kv_formula_fastcaote(), in, { 0, 0, 0 });
    }
    {
        // a single token takes all the weight
        const input in = by_hand({ 0.3f }, 1, { { 0.1f, 0.7f } });

        check("caote of one token",   llama_kv_formula_caote(),   in, { 0 });
        check("keydiff of one token", llama_kv_formula_keydiff(), in, { -1 });
        check("rkv of one token",     llama_kv_formula_rkv(),     in, { 0.1*0.3f/8 - 0.9 });
    }
}

static void test_empty() {
    for (const auto & c : cases()) {
        CHECK(score(*c.make(), {}).empty(), "%s", c.name);
        CHECK(same(c.make()->needs(), c.needs), "%s asks for something else than its formula takes", c.name);
    }
}

int main() {
    test_by_hand();
    test_random();
    test_empty();

    printf("%s\n", n_fail ? "FAILED" : "OK");

    return n_fail ? EXIT_FAILURE : EXIT_SUCCESS;
}
