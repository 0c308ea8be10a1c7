#include "equip-internal.h"

#include <algorithm>
#include <cmath>
#include <locale>
#include <sstream>

equip_options::equip_options(const char * text) {
    const std::string all = text ? text : "";

    for (size_t pos = 0; !all.empty() && pos <= all.size(); ) {
        const size_t      end  = std::min(all.find(',', pos), all.size());
        const std::string item = all.substr(pos, end - pos);
        const size_t      eq   = item.find('=');

        pos = end + 1;

        if (eq == std::string::npos || eq == 0) {
            equip_fail(EQUIP_ERR_USAGE, "the option '%s' is malformed: write key=value,key=value", item.c_str());
        }

        const std::string key = item.substr(0, eq);
        if (has(key.c_str())) {
            equip_fail(EQUIP_ERR_USAGE, "the option '%s' is given twice", key.c_str());
        }
        items.push_back({ key, item.substr(eq + 1), false });
    }
}

bool equip_options::has(const char * key) const {
    for (const auto & it : items) {
        if (it.key == key) {
            return true;
        }
    }
    return false;
}

equip_options::item * equip_options::find(const char * key) {
    for (auto & it : items) {
        if (it.key == key) {
            it.known = true;
            return &it;
        }
    }
    return nullptr;
}

std::string equip_options::get_word(const char * key, const std::string & def) {
    const item * it = find(key);
    return it ? it->value : def;
}

int64_t equip_options::get_count(const char * key, int64_t def) {
    const item * it = find(key);
    if (!it) {
        return def;
    }

    const std::string digits = it->value.substr(it->value.empty() || it->value[0] != '-' ? 0 : 1);
    if (digits.empty() || digits.size() > 18 || digits.find_first_not_of("0123456789") != std::string::npos) {
        equip_fail(EQUIP_ERR_USAGE, "the option %s is '%s', but it must be a whole number", key, it->value.c_str());
    }
    return std::stoll(it->value);
}

int64_t equip_options::get_int(const char * key, int64_t def, int64_t min, int64_t max) {
    const int64_t res = get_count(key, def);
    if (has(key) && (res < min || res > max)) {
        equip_fail(EQUIP_ERR_USAGE, "the option %s is %lld, but it must lie between %lld and %lld", key, (long long) res, (long long) min, (long long) max);
    }
    return res;
}

double equip_options::get_float(const char * key, double def, double min, double max) {
    const item * it = find(key);
    if (!it) {
        return def;
    }

    // the host program's locale must not turn the point into a comma
    std::istringstream in(it->value);
    in.imbue(std::locale::classic());

    double res  = 0;
    char   rest = 0;
    if (!(in >> res) || in >> rest || !std::isfinite(res)) {
        equip_fail(EQUIP_ERR_USAGE, "the option %s is '%s', but it must be a number", key, it->value.c_str());
    }
    if (res < min || res > max) {
        equip_fail(EQUIP_ERR_USAGE, "the option %s is %g, but it must lie between %g and %g", key, res, min, max);
    }
    return res;
}

bool equip_options::get_bool(const char * key, bool def) {
    return get_int(key, def ? 1 : 0, 0, 1) != 0;
}

void equip_options::finish() const {
    for (const auto & it : items) {
        if (!it.known) {
            equip_fail(EQUIP_ERR_USAGE, "the option '%s' is unknown", it.key.c_str());
        }
    }
}
