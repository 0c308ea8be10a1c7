#include "llama-kv-policy-spec.h"

#include "llama-kv-policy-registry.h"

#include <algorithm>
#include <cctype>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <set>
#include <stdexcept>

const std::vector<llama_kv_policy_desc> & llama_kv_policy_registry() {
    using names = std::vector<const char *>;

    const names ranks  = { "cache", "true", "auto" };
    const names auto_  = { "auto", "true", "cache" };
    const names all    = { "inplace", "shift", "gather" };
    const names scored = { "inplace", "gather" };

    static const std::vector<llama_kv_policy_desc> registry = {
        { "streaming",    { "token" },                  ranks, all,     /*.takes_recent =*/ false },
        { "h2o",          { "head", "layer", "token" }, auto_, scored,  true, nullptr, llama_kv_rule_h2o },
        { "tova",         { "layer", "head", "token" }, auto_, scored,  true, nullptr, llama_kv_rule_tova },
        { "snapkv",       { "head", "layer", "token" }, auto_, scored,  true, nullptr, llama_kv_rule_snapkv, /*.evict_every =*/ 32 },
        { "a2sf",         { "head", "layer", "token" }, auto_, scored,  true, nullptr, llama_kv_rule_a2sf },
        { "vatp",         { "head", "layer" },          auto_, scored,  true, nullptr, llama_kv_rule_vatp },
        { "caote",        { "head", "layer" },          auto_, scored,  true, nullptr, llama_kv_rule_caote },
        { "fastcaote",    { "head", "layer" },          auto_, scored,  true, nullptr, llama_kv_rule_fastcaote },
        { "pagedeviction", { "layer", "token" },        auto_, scored,  true, nullptr, llama_kv_rule_pagedeviction, 16, /*.eager =*/ true, /*.pages =*/ true },
        { "keydiff",      { "head", "layer" },          auto_, scored,  true, nullptr, llama_kv_rule_keydiff },
        { "knorm",        { "head", "layer" },          auto_, scored,  true, nullptr, llama_kv_rule_knorm },
        { "rkv",          { "head" },                   auto_, scored,  true, nullptr, llama_kv_rule_rkv, 128, /*.eager =*/ true },
        { "random",       { "token", "layer", "head" }, auto_, all,     true, llama_kv_victim_random, llama_kv_rule_random },
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
[[noreturn]] static void fail(std::string sentence) {
    std::replace_if(sentence.begin(), sentence.end(), [](char c) { return (unsigned char) c < 0x20 || c == 0x7f; }, '?');

    throw std::invalid_argument(sentence);
}

// a whole number in [0, MAX_TOKENS]
static int64_t parse_count(const std::string & key, const std::string & value) {
    const bool digits = !value.empty() && value.size() <= 18 && value.find_first_not_of("0123456789") == std::string::npos;

    if (!digits || std::stoll(value) > llama_kv_policy_spec::MAX_TOKENS) {
        fail("the policy's " + key + " is '" + value + "', but it must be a whole number from 0 to " + std::to_string(llama_kv_policy_spec::MAX_TOKENS) + ".");
    }

    return std::stoll(value);
}

static int64_t parse_positive(const std::string & key, const std::string & value) {
    const int64_t res = parse_count(key, value);

    if (res == 0) {
        fail("the policy's " + key + " is 0, but it must be a number of tokens from 1 on.");
    }

    return res;
}

// 0 or 1; what: their meanings
static int64_t parse_switch(const std::string & key, const std::string & value, const char * what) {
    if (value != "0" && value != "1") {
        fail("the policy's " + key + " is " + value + ", but it must be " + what + ".");
    }

    return value[0] - '0';
}

static void check_choice(const llama_kv_policy_desc & desc, const std::string & key, const std::string & value, const std::vector<const char *> & known) {
    if (std::none_of(known.begin(), known.end(), [&](const char * name) { return value == name; })) {
        fail("the policy " + std::string(desc.name) + " does not support " + key + "=" + value + "; use one of: " + join(known) + ".");
    }
}

static const llama_kv_rule_param * find_param(const std::vector<llama_kv_rule_param> & params, const std::string & name) {
    for (const auto & param : params) {
        if (name == param.name) {
            return &param;
        }
    }
    return nullptr;
}

static double parse_param(const llama_kv_rule_param & param, const std::string & value) {
    char *       end = nullptr;
    const double res = value.empty() || isspace((unsigned char) value[0]) ? NAN : strtod(value.c_str(), &end);

    const bool is_count = param.type != llama_kv_rule_param::REAL;
    const bool fits     = end && *end == '\0' && res >= param.min && res <= param.max && (!is_count || res == std::floor(res)) &&
        (param.type != llama_kv_rule_param::ODD || std::fmod(res, 2.0) == 1.0);

    if (!fits) {
        const char * kind = !is_count ? "a number" : param.type == llama_kv_rule_param::ODD ? "an odd whole number" : "a whole number";
        char range[64];
        snprintf(range, sizeof(range), " from %g to %g.", param.min, param.max);
        fail("the policy's " + std::string(param.name) + " is '" + value + "', but it must be " + kind + range);
    }

    return res;
}

std::unique_ptr<llama_kv_rule> llama_kv_policy_spec::make_rule() const {
    auto res = desc->rule();

    for (auto & param : res->params()) {
        for (const auto & [name, value] : params) {
            if (name == param.name) {
                *param.value = value;
            }
        }
    }

    return res;
}

uint32_t llama_kv_policy_spec::n_recent(uint32_t budget) const {
    return !desc->takes_recent ? 1 : recent >= 0 ? std::max<uint32_t>(1, (uint32_t) recent) : std::max<uint32_t>(16, budget/4);
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
        fail("the policy '" + name + "' is unknown; use one of: " + join(names) + ".");
    }

    if (colon == std::string::npos) {
        return res;
    }

    std::set<std::string> seen;

    const auto rule   = res.desc && res.desc->rule ? res.desc->rule() : nullptr;
    const auto params = rule ? rule->params() : std::vector<llama_kv_rule_param>();

    for (size_t pos = colon + 1; pos <= text.size(); ) {
        const size_t      end  = std::min(text.find(',', pos), text.size());
        const std::string item = text.substr(pos, end - pos);
        const size_t      eq   = item.find('=');

        pos = end + 1;

        if (eq == std::string::npos) {
            fail("the policy setting '" + item + "' is malformed; write NAME:key=value,key=value.");
        }

        const std::string key   = item.substr(0, eq);
        const std::string value = item.substr(eq + 1);

        if (!seen.insert(key).second) {
            fail("the policy setting '" + key + "' is given twice.");
        }

        if (key == "cpu_attn") {
            res.cpu_attn = parse_switch(key, value, "0 (llama.cpp's kernel) or 1 (ours)");
        } else if (key == "adapt_threads") {
            res.adapt_threads = parse_switch(key, value, "0 (as many threads as were asked for) or 1 (fewer where other programs are busy)");
        } else if (!res.desc) {
            fail("the policy none takes no settings but cpu_attn and adapt_threads; remove '" + item + "'.");
        } else if (key == "budget") {
            res.budget = parse_count(key, value);
        } else if (key == "sinks") {
            res.sinks = parse_count(key, value);
        } else if (key == "recent") {
            if (!res.desc->takes_recent) {
                fail("the policy " + name + " takes no recent: everything that is neither sink nor pinned is recent.");
            }
            res.recent = parse_count(key, value);
        } else if (key == "rotate_every") {
            res.rotate_every = value.size() > 1 && value[0] == '-' ? 0 : parse_count(key, value);
            if (res.rotate_every < 1) {
                fail("the policy's rotate_every is " + value + ", but keys are rotated after a whole number of evictions: use 1 (exact at each step) or more.");
            }
        } else if (key == "score_queries") {
            if (!res.desc->reads_weights()) {
                fail("the policy " + name + " reads no attention weights, so score_queries has no place with it.");
            }
            res.score_queries = value == "all" ? 0 : parse_count(key, value);
            if (value != "all" && res.score_queries == 0) {
                fail("the policy's score_queries is 0, but the weights of one query at least must count: use a number from 1, or all.");
            }
        } else if (key == "evict_every") {
            if (!res.desc->rule) {
                fail("the policy " + name + " takes no evict_every: its victims follow from the positions alone.");
            }
            res.evict_every = parse_positive(key, value);
        } else if (key == "page_size") {
            if (!res.desc->pages) {
                fail("the policy " + name + " evicts tokens, not pages, and takes no page_size.");
            }
            res.page_size = parse_positive(key, value);
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
            std::string own;
            for (const auto & each : params) {
                own += std::string(each.name) + ", ";
            }
            fail("the policy setting '" + key + "' is unknown; use " + own + "budget, sinks, recent, scope, positions, rotate_every, update, score_queries, evict_every, page_size, cpu_attn or adapt_threads.");
        }
    }

    if (!res.desc) {
        return res;
    }

    if (res.update == LLAMA_KV_UPDATE_SHIFT && (res.positions == LLAMA_KV_POSITIONS_TRUE || res.positions == LLAMA_KV_POSITIONS_AUTO)) {
        fail("update=shift gives every token its rank as position: use positions=cache with it.");
    }

    if (res.update == LLAMA_KV_UPDATE_SHIFT && res.has_rule()) {
        fail("update=shift drops a token for all layers and heads at once, and not scope=" + res.get_scope() + ": use update=inplace or update=gather.");
    }
    if (res.desc->pages && res.evict_every > 0) {
        fail("the policy " + name + " evicts whole pages: give page_size in place of evict_every.");
    }

    return res;
}
