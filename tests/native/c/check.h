/*
 * What the C tests share: a check that is never compiled away, and dice.
 */
#pragma once

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#define CHECK(condition) \
    do { \
        if (!(condition)) { \
            fprintf(stderr, "%s:%d: %s: not so: %s\n", __FILE__, __LINE__, __func__, #condition); \
            abort(); \
        } \
    } while (0)

/* xorshift64; the state is never 0. */
static inline uint64_t roll(uint64_t *dice)
{
    *dice ^= *dice << 13;
    *dice ^= *dice >> 7;
    *dice ^= *dice << 17;
    return *dice;
}

/* From 0 to before `below`. */
static inline uint32_t roll_below(uint64_t *dice, uint32_t below)
{
    return (uint32_t)((roll(dice) >> 32) * below >> 32);
}

static inline bool one_in(uint64_t *dice, uint32_t number)
{
    return roll_below(dice, number) == 0;
}
