/*
 * What the fuzzers share: the input as a small program, and memory of exactly the size that is meant.
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "check.h"

struct input {
    const uint8_t *at;
    size_t left;
};

/* Zeros when it is over. */
static inline void bytes(struct input *input, void *to, size_t number)
{
    size_t there = number < input->left ? number : input->left;
    memset(to, 0, number);
    if (there)
        memcpy(to, input->at, there);
    input->at += there;
    input->left -= there;
}

static inline uint8_t byte(struct input *input)
{
    uint8_t value;
    bytes(input, &value, sizeof(value));
    return value;
}

static inline uint16_t number16(struct input *input)
{
    uint16_t value;
    bytes(input, &value, sizeof(value));
    return value;
}

static inline uint32_t number32(struct input *input)
{
    uint32_t value;
    bytes(input, &value, sizeof(value));
    return value;
}

static inline void *exactly(size_t size)
{
    void *memory = calloc(1, size ? size : 1);
    CHECK(memory);
    return memory;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
