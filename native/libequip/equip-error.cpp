#include "equip-internal.h"

#include <cstdarg>
#include <cstdio>
#include <exception>

static thread_local std::string last_error = "no error";
static thread_local std::string returned;

static std::string format_args(const char * fmt, va_list args) {
    va_list copy;
    va_copy(copy, args);
    const int n = vsnprintf(nullptr, 0, fmt, copy);
    va_end(copy);

    std::string res(n > 0 ? n : 0, '\0');
    if (n > 0) {
        vsnprintf(&res[0], res.size() + 1, fmt, args);
    }
    return res;
}

std::string equip_format(const char * fmt, ...) {
    va_list args;
    va_start(args, fmt);
    std::string res = format_args(fmt, args);
    va_end(args);
    return res;
}

void equip_fail(int status, const char * fmt, ...) {
    va_list args;
    va_start(args, fmt);
    std::string sentence = format_args(fmt, args);
    va_end(args);
    throw equip_failure{ status, std::move(sentence) };
}

int equip_set_error(int status, const std::string & sentence) {
    // one line without a full stop, also where parts of it come from elsewhere
    last_error.clear();
    for (const char c : sentence) {
        const bool is_space = c == ' ' || c == '\n' || c == '\r' || c == '\t';
        if (!is_space) {
            last_error += c;
        } else if (!last_error.empty() && last_error.back() != ' ') {
            last_error += ' ';
        }
    }
    while (!last_error.empty() && (last_error.back() == '.' || last_error.back() == ' ')) {
        last_error.pop_back();
    }
    return status;
}

int equip_set_current_exception() {
    try {
        throw;
    } catch (const equip_failure & err) {
        return equip_set_error(err.status, err.sentence);
    } catch (const std::bad_alloc &) {
        return equip_set_error(EQUIP_ERR_MEMORY, "out of memory: try a smaller budget, a smaller batch or a smaller model");
    } catch (const std::exception & err) {
        return equip_set_error(EQUIP_ERR_BACKEND, equip_format("unexpected failure in llama.cpp: %s", err.what()));
    } catch (...) {
        return equip_set_error(EQUIP_ERR_BACKEND, "unexpected failure in llama.cpp");
    }
}

const char * equip_return(std::string text) {
    returned = std::move(text);
    return returned.c_str();
}

const char * equip_error(void) {
    return last_error.c_str();
}
