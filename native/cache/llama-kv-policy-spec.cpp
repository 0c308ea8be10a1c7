#include "llama-kv-policy-spec.h"

#include "llama-kv-policy-registry.h"
#include "llama-kv-pool.h"
#include "llama-kv-policy-status.h"

#include <algorithm>
#include <cctype>
#include <cmath>
#include <cstdio>
#include <iomanip>
#include <locale>
#include <set>
#include <sstream>

const std::vector<llama_kv_policy_desc> & llama_kv_policy_registry() {
    using names = std::vector<const char *>;

    const names ranks  = { "cache", "true", "auto" };
    const names auto_  = { "auto", "true", "cache" };
    const names all    = { "inplace", "shift", "gather" };
    const names scored = { "inplace", "gather" };

    static const std::vector<llama_kv_policy_desc> registry = {
        { "streaming",    { "token" },                  ranks, all,     /*.takes_recent =*/ false },
        { "h2o",          { "head", "layer", "token" }, auto_, scored,  true, nullptr, llama_kv_formula_h2o },
        { "tova",         { "layer", "head", "token" }, auto_, scored,  true, nullptr, llama_kv_formula_tova },
        { "snapkv",       { "head", "layer", "token" }, auto_, scored,  true, nullptr, llama_kv_formula_snapkv, /*.evict_every =*/ 32 },
        { "a2sf",         { "head", "layer", "token" }, auto_, scored,  true, nullptr, llama_kv_formula_a2sf },
        { "vatp",         { "head", "layer" },          auto_, scored,  true, nullptr, llama_kv_formula_vatp },
        { "caote",        { "head", "layer" },          auto_, scored,  true, nullptr, llama_kv_formula_caote },
        { "fastcaote",    { "head", "layer" },          auto_, scored,  true, nullptr, llama_kv_formula_fastcaote },
        { "pagedeviction", { "layer", "token" },        auto_, scored,  true, nullptr, llama_kv_formula_pagedeviction },
        { "keydiff",      { "head", "layer" },          auto_, scored,  true, nullptr, llama_kv_formula_keydiff },
        { "knorm",        { "head", "layer" },          auto_, scored,  true, nullptr, llama_kv_formula_knorm },
        { "rkv",          { "head" },                   auto_, scored,  true, nullptr, llama_kv_formula_rkv, 128, /*.eager =*/ true },
        { "lagkv",        { "head", "layer", "token" }, auto_, scored,  true, nullptr, llama_kv_formula_lagkv, 32 },
        { "external",     { "head", "layer", "token" }, auto_, scored,  true, nullptr, llama_kv_formula_external },
        { "random",       { "token", "layer", "head" }, auto_, all,     true, llama_kv_victim_random, llama_kv_formula_random },
    };

    return registry;
}

static std::string join(const std::vector<const char *> & names) {
    std::string res;

    for (const char * name : names) {
        res += res.empty() ? name : std::string(", ") + name;
    }

    return res;
}

// what was given is quoted: it stays one line, whatever is in it
[[noreturn]] static void fail(std::string sentence, int status = LLAMA_KV_POLICY_USAGE) {
    std::replace_if(sentence.begin(), sentence.end(), [](char c) { return (unsigned char) c < 0x20 || c == 0x7f; }, '?');

    throw llama_kv_policy_refusal(status, sentence);
}

static std::string quoted(const std::string & value, bool is_number) {
    return is_number ? value : "'" + value + "'";
}

// a whole number in [low, MAX_TOKENS]; what: the words that may stand in its place
static int64_t parse_count(const std::string & key, const std::string & value, int64_t low = 0, const char * what = "") {
    const size_t begin     = value.rfind('-', 0) == 0 ? 1 : 0;
    const bool   is_number = value.size() > begin && value.find_first_not_of("0123456789", begin) == std::string::npos;

    if (!is_number || begin > 0 || value.size() > 18 || std::stoll(value) < low || std::stoll(value) > llama_kv_policy_spec::MAX_TOKENS) {
        fail(key + " is " + quoted(value, is_number) + ": give " + what + "a whole number from " + std::to_string(low) + " to " + std::to_string(llama_kv_policy_spec::MAX_TOKENS) +
             (key == "budget" ? " (0 = the trained context)" : ""), key == "budget" && is_number ? LLAMA_KV_POLICY_BUDGET : LLAMA_KV_POLICY_USAGE);
    }

    return std::stoll(value);
}

// 0 or 1; what: their meanings
static int64_t parse_switch(const std::string & key, const std::string & value, const char * what) {
    if (value != "0" && value != "1") {
        fail(key + " is " + value + ": give " + what);
    }

    return value[0] - '0';
}

static void check_choice(const llama_kv_policy_desc & desc, const std::string & key, const std::string & value, const std::vector<const char *> & known) {
    if (std::none_of(known.begin(), known.end(), [&](const char * name) { return value == name; })) {
        fail("the policy " + std::string(desc.name) + " has no " + key + " '" + value + "': choose one of " + join(known));
    }
}

static const llama_kv_formula_param * find_param(const std::vector<llama_kv_formula_param> & params, const std::string & name) {
    for (const auto & param : params) {
        if (name == param.name) {
            return &param;
        }
    }
    return nullptr;
}

// whatever the program's locale writes a decimal point as
static std::string number_text(double value) {
    std::ostringstream res;
    res.imbue(std::locale::classic());
    res << std::setprecision(9) << value;
    return res.str();
}

static double parse_param(const llama_kv_formula_param & param, const std::string & value) {
    double             res = NAN;
    std::istringstream in(value);
    in.imbue(std::locale::classic());
    const bool is_number = !value.empty() && !isspace((unsigned char) value[0]) && in >> res && in.peek() == EOF;

    const bool is_count = param.type != llama_kv_formula_param::REAL;
    const bool fits     = is_number && res >= param.min && res <= param.max && (!is_count || res == std::floor(res)) &&
        (param.type != llama_kv_formula_param::ODD || std::fmod(res, 2.0) == 1.0);

    if (!fits) {
        const char * kind = !is_count ? "a number" : param.type == llama_kv_formula_param::ODD ? "an odd number" : "a whole number";
        fail(std::string(param.name) + " is " + quoted(value, is_number) + ": give " + kind + " from " + number_text(param.min) + " to " + number_text(param.max));
    }

    return res;
}

std::unique_ptr<llama_kv_formula> llama_kv_policy_spec::make_formula() const {
    auto res = desc->formula();

    for (auto & param : res->all_params()) {
        for (const auto & [name, value] : params) {
            if (name == param.name) {
                *param.value = value;
            }
        }
    }

    return res;
}

const char * llama_kv_policy_spec::positions_name() const {
    return positions == LLAMA_KV_POSITIONS_TRUE ? "true" : positions == LLAMA_KV_POSITIONS_AUTO ? "auto" : "cache";
}

uint32_t llama_kv_policy_spec::n_recent(uint32_t budget) const {
    const int64_t n = recent >= 0 ? recent : desc->recent;

    return !desc->takes_recent ? 1 : n >= 0 ? std::max<uint32_t>(1, (uint32_t) n) : std::max<uint32_t>(16, budget/4);
}

llama_kv_policy_spec llama_kv_policy_parse(const std::string & text) {
    llama_kv_policy_spec res;

    const size_t      colon = text.find(':');
    const std::string name  = text.substr(0, colon);

    std::vector<const char *> names = { "none" };
    for (const auto & desc : llama_kv_policy_registry()) {
        names.push_back(desc.name);

        if (name == desc.name) {
            res.desc = &desc;
        }
    }

    if (!res.desc && name != "none") {
        fail("there is no policy '" + name + "': choose one of " + join(names));
    }

    if (colon == std::string::npos) {
        return res;
    }

    std::set<std::string> seen;

    const auto formula = res.desc && res.desc->formula ? res.desc->formula() : nullptr;
    const auto params  = formula ? formula->all_params() : std::vector<llama_kv_formula_param>();

    for (size_t pos = colon + 1; pos <= text.size(); ) {
        const size_t      end  = std::min(text.find(',', pos), text.size());
        const std::string item = text.substr(pos, end - pos);
        const size_t      eq   = item.find('=');

        pos = end + 1;

        if (eq == std::string::npos) {
            fail("the policy setting '" + item + "' is malformed; write NAME:key=value,key=value");
        }

        const std::string key   = item.substr(0, eq);
        const std::string value = item.substr(eq + 1);

        if (!seen.insert(key).second) {
            fail("the policy setting '" + key + "' is given twice");
        }

        if (key == "cpu_attn") {
            res.cpu_attn = parse_switch(key, value, "0 (llama.cpp's kernel) or 1 (ours)");
        } else if (key == "adapt_threads") {
            res.adapt_threads = parse_switch(key, value, "0 (as many threads as were asked for) or 1 (fewer where other programs are busy)");
        } else if (!res.desc) {
            fail("the policy none takes no settings but cpu_attn and adapt_threads; remove '" + item + "'");
        } else if (key == "budget") {
            res.budget = parse_count(key, value);
        } else if (key == "pool") {
            res.pool = value == "auto" ? llama_kv_policy_spec::POOL_AUTO : parse_count(key, value, 1, "auto, or ");
        } else if (key == "sinks") {
            res.sinks = parse_count(key, value);
        } else if (key == "recent") {
            if (!res.desc->takes_recent) {
                fail("the policy " + name + " keeps the newest tokens that the budget leaves beside the sinks: leave recent out");
            }
            res.recent = parse_count(key, value);
        } else if (key == "rotate_every") {
            res.rotate_every = parse_count(key, value, 1);
        } else if (key == "score_queries") {
            res.score_queries = value == "all" ? 0 : parse_count(key, value, 1, "all, or ");
            if (!res.desc->reads_weights()) {
                fail("the policy " + name + " reads no attention weights: leave score_queries out");
            }
        } else if (key == "evict_every") {
            res.evict_every = parse_count(key, value, 1);
            if (!res.desc->formula || res.desc->page_size() > 0) {
                fail("the policy " + name + " chooses a fixed number of victims at once: leave evict_every out");
            }
        } else if (key == "filter") {
            res.filter = parse_param({ "filter", llama_kv_formula_param::REAL, nullptr, 0.0, 0.0, 0.9, "" }, value);
        } else if (key == "filter_layers") {
            res.filter_layers = parse_count(key, value, 1);
        } else if (key == "filter_warmup") {
            res.filter_warmup = parse_count(key, value);
        } else if (key == "scope") {
            check_choice(*res.desc, key, value, res.desc->scopes);
            res.scope = value;
        } else if (key == "update") {
            check_choice(*res.desc, key, value, res.desc->updates);
            res.update = value == "shift" ? LLAMA_KV_UPDATE_SHIFT : value == "gather" ? LLAMA_KV_UPDATE_GATHER : LLAMA_KV_UPDATE_INPLACE;
        } else if (key == "positions") {
            check_choice(*res.desc, key, value, res.desc->positions);
            res.positions = value == "true" ? LLAMA_KV_POSITIONS_TRUE : value == "auto" ? LLAMA_KV_POSITIONS_AUTO : LLAMA_KV_POSITIONS_CACHE;
        } else if (const auto * param = find_param(params, key)) {
            res.params.emplace_back(key, parse_param(*param, value));
        } else {
            std::string own, either;
            for (const auto & each : params) {
                own    += std::string(each.name) + ", ";
                either += (either.empty() ? "" : " or ") + std::string(each.name);
            }
            for (const auto & other : llama_kv_policy_registry()) {
                const auto theirs = other.formula ? other.formula() : nullptr;
                if (theirs && find_param(theirs->all_params(), key)) {
                    if (key == "page_size") {
                        fail("the policy " + name + " evicts tokens, not pages: leave page_size out");
                    }
                    fail("the policy " + name + " has no parameter " + key + ": " + (either.empty() ? "leave it out" : "give " + either));
                }
            }
            fail("the policy setting '" + key + "' is unknown; use " + own + "budget, pool, sinks, recent, scope, positions, rotate_every, update, score_queries, evict_every, filter, filter_layers, filter_warmup, cpu_attn or adapt_threads");
        }
    }

    if (!res.desc) {
        return res;
    }

    if (res.update == LLAMA_KV_UPDATE_SHIFT && (res.positions == LLAMA_KV_POSITIONS_TRUE || res.positions == LLAMA_KV_POSITIONS_AUTO)) {
        fail(std::string("update=shift gives every token its rank as position, so its positions cannot be ") + res.positions_name() + ": use positions=cache, or update=inplace or update=gather");
    }

    if (res.update == LLAMA_KV_UPDATE_SHIFT && res.has_formula()) {
        fail("update=shift takes a token from all layers and heads at once, so its scope cannot be " + res.get_scope() + ": use scope=token, or update=inplace or update=gather");
    }
    if (const std::string why = res.why_no_pool(); res.pool > 0 && !why.empty()) {
        fail(why);
    }
    if (res.filter < 0.0 && (res.filter_layers >= 0 || res.filter_warmup >= 0)) {
        fail(std::string(res.filter_layers >= 0 ? "filter_layers" : "filter_warmup") + " means nothing without filter: give filter, or leave it out");
    }
    if (const std::string why = res.filter > 0.0 ? res.why_no_filter() : ""; !why.empty()) {
        fail(why);
    }
    if (res.budget > 0) {
        llama_kv_policy_check_budget(res, res.budget);
    }

    return res;
}

void llama_kv_policy_check_budget(const llama_kv_policy_spec & spec, int64_t budget, const std::string & lowered) {
    const int64_t     recent = spec.n_recent((uint32_t) budget);
    const int64_t     needed = spec.sinks + recent + 1;
    const std::string what   = "the budget of " + std::to_string(budget) + " tokens" + lowered;

    if (budget < needed) {
        fail(what + " is too small: it cannot hold " + std::to_string(spec.sinks) + " sinks, " + std::to_string(recent) +
             " recent tokens and the new one: use budget=" + std::to_string(needed) + " or more", LLAMA_KV_POLICY_BUDGET);
    }
    if (spec.desc->page_size() == 0) {
        return;
    }

    const int64_t page = spec.get_page_size();
    const int64_t low  = std::max<int64_t>(1, budget/page)*page;
    const int64_t full = needed + 2*page - 2;

    if (budget % page != 0) {
        fail(what + " is no multiple of the page size " + std::to_string(page) + ": give " + std::to_string(low) + " or " + std::to_string(low + page), LLAMA_KV_POLICY_BUDGET);
    }
    if (budget < full) {
        fail(what + " is too small for pages of " + std::to_string(page) + ": a whole page beside sinks and recent tokens is certain from budget=" +
             std::to_string((full + page - 1)/page*page) + " on", LLAMA_KV_POLICY_BUDGET);
    }
}

std::string llama_kv_policy_spec::why_no_pool() const {
    if (desc->page_size() > 0 && llama_kv_pool::PAGE % get_page_size() != 0) {
        return "page_size=" + std::to_string(get_page_size()) + " does not divide the pages of a pool, which have " + std::to_string(llama_kv_pool::PAGE) +
            " tokens: use page_size=8, 16, 32 or 64, or leave pool out";
    }
    return update == LLAMA_KV_UPDATE_INPLACE ? "" : "a pool is for update=inplace: leave update out, or pool";
}

std::string llama_kv_policy_spec::why_no_filter() const {
    const std::string name = desc->name;

    if (get_scope() == "token") {
        return "filter leaves a token out of some layers, so the scope cannot be token: " +
            std::string(std::any_of(desc->scopes.begin(), desc->scopes.end(), [](const std::string & s) { return s != "token"; }) ? "use scope=layer or scope=head" :
                    "use another policy, such as h2o");
    }
    if (positions != LLAMA_KV_POSITIONS_DEFAULT && positions != LLAMA_KV_POSITIONS_TRUE) {
        return std::string("filter leaves tokens out of some layers, which then have no common ranks, so positions cannot be ") + positions_name() + ": use positions=true";
    }
    if (update != LLAMA_KV_UPDATE_INPLACE) {
        return "filter is for update=inplace: leave update out, or filter";
    }
    if (pool > 0) { // pool=auto is none for one sequence
        return "filter is for one sequence, not for a pool: leave pool out, or filter";
    }

    const auto needs = make_formula()->needs();

    if (needs.window > 0 || needs.page_size > 0 || needs.state || needs.given || needs.k_unrotated || desc->eager) {
        return "the policy " + name + (needs.page_size > 0 ? " evicts pages" : needs.window > 0 ? " chooses by its last queries" :
            needs.given ? " takes scores from outside" : needs.k_unrotated ? " follows where each key stands" : " remembers its choices") +
            ", which a token that is left out would disturb: leave filter out, or use another policy, such as h2o";
    }
    if (evict_every > 1) {
        return "filter is for one victim at a time: use evict_every=1, or leave filter out";
    }
    return "";
}

std::string llama_kv_policy_text(const llama_kv_policy_spec & spec) {
    std::string res;

    const auto add = [&](const char * key, const std::string & value) {
        res += (res.empty() ? ":" : ",") + std::string(key) + "=" + value;
    };
    const auto add_switch = [&](const char * key, int64_t value) {
        if (value >= 0) {
            add(key, std::to_string(value));
        }
    };

    if (spec.desc) {
        const auto & desc = *spec.desc;

        add("budget", std::to_string(spec.budget));
        if (spec.pool > 0) {
            add("pool", std::to_string(spec.pool));
        }
        add("sinks",  std::to_string(spec.sinks));
        if (desc.takes_recent) {
            add("recent", std::to_string(spec.n_recent((uint32_t) spec.budget)));
        }
        add("scope",     spec.get_scope());
        add("positions", spec.positions_name());
        if (spec.rotates_by_debt()) {
            add("rotate_every", std::to_string(spec.rotate_every));
        }
        add("update", spec.update == LLAMA_KV_UPDATE_SHIFT ? "shift" : spec.update == LLAMA_KV_UPDATE_GATHER ? "gather" : "inplace");

        if (desc.reads_weights()) {
            add("score_queries", spec.score_queries == 0 ? "all" : std::to_string(spec.score_queries));
        }
        if (desc.formula && desc.page_size() == 0) {
            add("evict_every", std::to_string(spec.evict_every));
        }
        if (spec.filter > 0.0) {
            add("filter",        number_text(spec.filter));
            add("filter_layers", std::to_string(spec.filter_layers));
            add("filter_warmup", std::to_string(spec.filter_warmup));
        }
        if (desc.formula) {
            const auto formula = spec.make_formula();
            for (const auto & param : formula->all_params()) {
                if (param.value != &formula->graph && param.value != &formula->graph_near) {
                    add(param.name, number_text(*param.value));
                }
            }
            if (formula->graph > 0.0) {
                add("graph", number_text(formula->graph));
                add("graph_near", number_text(formula->graph_near));
            }
        }
    }
    add_switch("cpu_attn",      spec.cpu_attn);
    add_switch("adapt_threads", spec.adapt_threads);

    return (spec.desc ? spec.desc->name : "none") + res;
}
