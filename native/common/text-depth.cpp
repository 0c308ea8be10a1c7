#include "text-depth.h"

#include <algorithm>
#include <stdexcept>

size_t json_depth(const char * text) {
    size_t depth  = 0;
    size_t res    = 0;
    bool   quoted = false;

    for (const char * p = text; *p; ++p) {
        if (quoted) {
            if (*p == '\\' && p[1]) {
                ++p;
            } else if (*p == '"') {
                quoted = false;
            }
        } else if (*p == '"') {
            quoted = true;
        } else if (*p == '[' || *p == '{') {
            res = std::max(res, ++depth);
        } else if ((*p == ']' || *p == '}') && depth > 0) {
            --depth;
        }
    }

    return res;
}

void json_check_depth(const std::string & text) {
    if (json_depth(text.c_str()) > JSON_MAX_DEPTH) {
        throw std::invalid_argument("JSON nested more than " + std::to_string(JSON_MAX_DEPTH) + " levels deep: flatten it");
    }
}

void pattern_check_depth(const std::string & pattern) {
    size_t depth = 0;

    for (size_t i = 0; i < pattern.size(); ++i) {
        if (pattern[i] == '\\') {
            ++i;
        } else if (pattern[i] == '(') {
            if (++depth > PATTERN_MAX_DEPTH) {
                throw std::invalid_argument("a pattern nests more than " + std::to_string(PATTERN_MAX_DEPTH) + " groups: use a simpler one");
            }
        } else if (pattern[i] == ')' && depth > 0) {
            --depth;
        }
    }
}
