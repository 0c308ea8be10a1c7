#include "llama-kv-policy-spec.h"

#include <algorithm>
#include <set>
#include <stdexcept>

const std::vector<llama_kv_policy_desc> & llama_kv_policy_registry() {
    static const std::vector<llama_kv_policy_desc> registry = {
        { "streaming", { "token" }, { "cache", "true", "auto" }, { "inplace", "shift", "gather" }, /*.takes_recent =*/ false, nullptr },
        { "random",    { "token" }, { "auto", "true", "cache" }, { "inplace", "shift", "gather" }, /*.takes_recent =*/ true,  llama_kv_victim_random },
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

[[noreturn]] static void fail(const std::string & sentence) {
    throw std::invalid_argument(sentence);
}

// a whole number in [0, 2^30]: room for slot arithmetic in 32 bits
static int64_t parse_count(const std::string & key, const std::string & value) {
    const bool digits = !value.empty() && value.size() <= 18 && value.find_first_not_of("0123456789") == std::string::npos;

    if (!digits || std::stoll(value) > (1ll << 30)) {
        fail("the policy's " + key + " is '" + value + "', but it must be a whole number from 0 to " + std::to_string(1ll << 30) + ".");
    }

    return std::stoll(value);
}

static void check_choice(const llama_kv_policy_desc & desc, const std::string & key, const std::string & value, const std::vector<const char *> & known) {
    if (std::none_of(known.begin(), known.end(), [&](const char * name) { return value == name; })) {
        fail("the policy " + std::string(desc.name) + " does not support " + key + "=" + value + "; use one of: " + join(known) + ".");
    }
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

    if (!res.desc) {
        fail("the policy none takes no settings; remove '" + text.substr(colon) + "'.");
    }

    std::set<std::string> seen;

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

        if (key == "budget") {
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
        } else if (key == "scope") {
            check_choice(*res.desc, key, value, res.desc->scopes);
        } else if (key == "update") {
            check_choice(*res.desc, key, value, res.desc->updates);
            res.update = value == "shift" ? LLAMA_KV_UPDATE_SHIFT : value == "gather" ? LLAMA_KV_UPDATE_GATHER : LLAMA_KV_UPDATE_INPLACE;
        } else if (key == "positions") {
            check_choice(*res.desc, key, value, res.desc->positions);
            res.positions = value == "true" ? LLAMA_KV_POSITIONS_TRUE : value == "auto" ? LLAMA_KV_POSITIONS_AUTO : LLAMA_KV_POSITIONS_CACHE;
        } else {
            fail("the policy setting '" + key + "' is unknown; use budget, sinks, recent, scope, positions, rotate_every or update.");
        }
    }

    if (res.update == LLAMA_KV_UPDATE_SHIFT && (res.positions == LLAMA_KV_POSITIONS_TRUE || res.positions == LLAMA_KV_POSITIONS_AUTO)) {
        fail("update=shift gives every token its rank as position: use positions=cache with it.");
    }

    return res;
}
