#pragma once

// how deep a text nests: what reads it, and what is made of it, recurses once per level

#include <cstddef>
#include <string>

// one level costs upstream near 1 KiB of stack at most (JSON schemas): a thread of 1 MiB stands these
static const size_t JSON_MAX_DEPTH    = 200;
static const size_t PATTERN_MAX_DEPTH = 100;

// levels of arrays and objects; of a text that is no JSON, those of its brackets
size_t json_depth(const char * text);

// throws std::invalid_argument above JSON_MAX_DEPTH
void json_check_depth(const std::string & text);

// groups within groups of a regular expression; throws std::invalid_argument above PATTERN_MAX_DEPTH
void pattern_check_depth(const std::string & pattern);
