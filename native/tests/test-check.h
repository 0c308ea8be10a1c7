#pragma once

// checks that go on after a failure; no dependency on llama.cpp

#include <cstdio>

static int n_fail = 0;

#define CHECK(cond, ...)                                               \
    do {                                                               \
        if (!(cond)) {                                                 \
            fprintf(stderr, "%s:%d: %s: ", __FILE__, __LINE__, #cond); \
            fprintf(stderr, __VA_ARGS__);                              \
            fprintf(stderr, "\n");                                     \
            n_fail++;                                                  \
        }                                                              \
    } while (0)
