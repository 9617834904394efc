/* y = x W^T for a few rows of x and a matrix W of 4-bit codes, read once and decoded in registers.
 *
 *     W[n,k] = s[n,g] * (T[q[n,k]] - z[n,g]),   g = k / group
 *
 * T is any table of 16 floats. A level is looked up byte by byte: `vpshufb` maps 32 codes through a table of 16 bytes,
 * so a level of 4 bytes (NF4) costs four look-ups, one whose low half is zero (exact in bfloat16) two, and the integers
 * 0..15 one, see `decode`. No level, scale or zero is rounded. Sums are fp32, one per group, then scaled. The integers
 * 0..15 with x in bfloat16 take a way of their own, in integers: see `fix`.
 *
 * Layout: 64 codes of a row are 32 bytes; the low nibbles are the first 32 codes, the high nibbles the other 32. Within
 * each 32, code k = 16h + 8o + 4L + p (h, o, L in 0..1, p in 0..3) lies in byte 16L + 8h + 2p + o. That is the order in
 * which the byte-wise unpacking below yields vectors of 8 consecutive codes. Rows are contiguous, K/2 bytes each.
 *
 * Each output is computed wholly by one thread, in an order that does not depend on their number: same inputs, same
 * bits.
 */
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX2__) && defined(__FMA__) && !defined(LUT4_PORTABLE)
#include <immintrin.h>
#define LUT4_AVX2 1
#endif

enum { FP32 = 0, BF16 = 1 };  /* type of x and y */
enum { OK = 0, NO_MEMORY = 1 };

#define INLINE static inline __attribute__((always_inline))

INLINE uint32_t bits_of(float f) { uint32_t u; memcpy(&u, &f, 4); return u; }
INLINE float float_of(uint32_t u) { float f; memcpy(&f, &u, 4); return f; }

/* bfloat16, to nearest, ties to even; a NaN stays one. */
INLINE uint16_t to_bf16(float f)
{
    uint32_t u = bits_of(f);
    if ((u & 0x7fffffff) > 0x7f800000) return 0x7fc0;
    return (uint16_t)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

INLINE void store(void *y, int type, size_t i, float value)
{
    if (type == BF16) ((uint16_t *)y)[i] = to_bf16(value);
    else ((float *)y)[i] = value;
}

static void to_float(const void *x, int type, size_t count, float *out)
{
    if (type == FP32) memcpy(out, x, count * sizeof(float));
    else for (size_t i = 0; i < count; i++) out[i] = float_of((uint32_t)((const uint16_t *)x)[i] << 16);
}

/* What every thread reads and none writes. */
typedef struct {
    const float *x;       /* (M, K) fp32, in the order the decoder yields; or what `fix` makes of it */
    const float *sums;    /* (M, groups, 16): what `summarise` or `fix` makes */
    const uint8_t *codes; /* (N, K/2) */
    const float *table, *scales, *zeros;
    const uint32_t *pairs; /* instead of scales and zeros: a scale in the upper half and its zero in the lower, bf16 */
    void *y;
    int type, N, K, group, groups;
} Job;

INLINE float scale_of(const Job *job, size_t at)
{
    return job->pairs ? float_of(job->pairs[at] & 0xffff0000) : job->scales[at];
}

INLINE float zero_of(const Job *job, size_t at)
{
    return job->pairs ? float_of(job->pairs[at] << 16) : job->zeros ? job->zeros[at] : 0;
}

#ifdef LUT4_AVX2

/* What the table allows. Bits of 16 + q, q in 0..15, are 0x41800000 + (q << 19): one byte, below a constant one. */
enum { HALF = 0, WIDE = 1, INTEGERS = 2, FIXED = 3 };
#define SIXTEEN 0x4180
#define PREFETCH(here) _mm_prefetch((const char *)((here) + 64), _MM_HINT_T0)  /* past the end it does nothing */

typedef struct { __m256i byte[4]; } Lut;  /* byte b of the 16 levels, in both 128-bit lanes */

static int kind_of(const float *table)
{
    int wide = 0, integers = 1;
    for (int i = 0; i < 16; i++) wide |= (bits_of(table[i]) & 0xffff) != 0, integers &= table[i] == (float)i;
    return integers ? INTEGERS : wide ? WIDE : HALF;
}

static Lut split_table(const float *table, int kind)
{
    Lut lut;
    for (int b = 0; b < 4; b++) {
        uint8_t bytes[16];
        for (int i = 0; i < 16; i++) bytes[i] = (uint8_t)(bits_of(table[i] + (kind == INTEGERS ? 16 : 0)) >> (8 * b));
        lut.byte[b] = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)bytes));
    }
    return lut;
}

/* 32 codes, one per byte, to 4 vectors of 8 levels.
 *
 * Integers come as 16 + q. Of each pair of 16-bit words the even one is shifted up; the odd one is left in place with the
 * even one below it, in the mantissa, where it adds (0x4180 + 8 q_even) ulps of 2^-19: a constant and q_even / 2^16. Both
 * are linear, so `arrange` takes x_odd / 2^16 from x_even, and the start of each sum takes the constants off. The price
 * is that sums of 16 + q round as a zero point of 16 would make them: to 1e-6 of the terms, not of the result. */
INLINE void decode(__m256i code, const Lut *lut, int kind, __m256 w[4])
{
    __m256i b2 = _mm256_shuffle_epi8(lut->byte[2], code);
    __m256i b3 = kind == INTEGERS ? _mm256_set1_epi8(SIXTEEN >> 8) : _mm256_shuffle_epi8(lut->byte[3], code);
    __m256i high0 = _mm256_unpacklo_epi8(b2, b3);  /* upper 16 bits of the levels in bytes 0-7 of each lane */
    __m256i high1 = _mm256_unpackhi_epi8(b2, b3);  /* bytes 8-15 */
    if (kind != WIDE) {
        __m256i odd = _mm256_set1_epi32(kind == INTEGERS ? -1 : (int)0xffff0000);  /* -1: no instruction at all */
        w[0] = _mm256_castsi256_ps(_mm256_slli_epi32(high0, 16));
        w[1] = _mm256_castsi256_ps(_mm256_and_si256(high0, odd));
        w[2] = _mm256_castsi256_ps(_mm256_slli_epi32(high1, 16));
        w[3] = _mm256_castsi256_ps(_mm256_and_si256(high1, odd));
    } else {  /* interleave with the lower halves: bytes 0-3 of each lane, 4-7 ..., an order `arrange` gives to x too */
        __m256i b0 = _mm256_shuffle_epi8(lut->byte[0], code), b1 = _mm256_shuffle_epi8(lut->byte[1], code);
        __m256i low0 = _mm256_unpacklo_epi8(b0, b1), low1 = _mm256_unpackhi_epi8(b0, b1);
        w[0] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(low0, high0));
        w[1] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(low0, high0));
        w[2] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(low1, high1));
        w[3] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(low1, high1));
    }
}

/* Bring x into the form that `decode` is made for: see there. */
static void arrange(float *x, size_t count, int kind)
{
    for (size_t i = 0; i < count && kind != HALF; i += 16) {
        __m256 a = _mm256_loadu_ps(x + i), b = _mm256_loadu_ps(x + i + 8);
        if (kind == INTEGERS) {
            _mm256_storeu_ps(x + i, _mm256_fnmadd_ps(b, _mm256_set1_ps(1.0f / 65536), a));
        } else {
            _mm256_storeu_ps(x + i, _mm256_unpacklo_ps(a, b));
            _mm256_storeu_ps(x + i + 8, _mm256_unpackhi_ps(a, b));
        }
    }
}

/* For each group, lane by lane: first the sum of x, which the zero point multiplies; then, for integers, the sum of what
 * `decode` adds to each product, made from the arranged x. */
static void summarise(const float *x, size_t groups, int group, float *sums, int arranged)
{
    for (size_t g = 0; g < groups; g++, x += group) {
        __m256 even = _mm256_setzero_ps(), odd = _mm256_setzero_ps();
        for (int k = 0; k < group; k += 16) {
            even = _mm256_add_ps(even, _mm256_loadu_ps(x + k));
            odd = _mm256_add_ps(odd, _mm256_loadu_ps(x + k + 8));
        }
        const __m256 on_even = _mm256_set1_ps(16), on_odd = _mm256_set1_ps(16 + SIXTEEN / 524288.0f);  /* 2^19 */
        __m256 weighted = _mm256_fmadd_ps(odd, on_odd, _mm256_mul_ps(even, on_even));
        _mm256_storeu_ps(sums + 16 * g + 8 * arranged, arranged ? weighted : _mm256_add_ps(even, odd));
    }
}

INLINE float horizontal_sum(__m256 v)
{
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

/* Rows n .. n+R-1 of W with rows m .. m+M-1 of x, A partial sums each, so that A * R * M chains of additions run side
 * by side. R, M, A, kind and mostly group are constants where this is inlined: loops over them vanish, sums are registers. */
INLINE void tile(const Job *job, const Lut *lut, int n, int m, int R, int M, int A, int kind, int group)
{
    const size_t K = (size_t)job->K, groups = (size_t)job->groups;
    const __m256i nibble = _mm256_set1_epi8(15);
    const int group32 = group == 32, blocks = group32 ? 1 : group / 64, passes = group32 ? 2 : 1;
    const uint8_t *codes = job->codes + (size_t)n * (K / 2);
    const float *x = job->x + (size_t)m * K;
    __m256 total[2][4], sum[2][4][2];  /* R, M, A at most */
    for (int r = 0; r < R; r++) for (int i = 0; i < M; i++) total[r][i] = _mm256_setzero_ps();

    for (size_t first = 0; first < groups; first += passes, codes += 32 * blocks, x += 64 * blocks) {
        for (int pass = 0; pass < passes; pass++) {  /* a group of 32 is half a block: the low nibbles, then the high */
            const size_t g = first + pass, at = (size_t)n * groups + g;
            for (int r = 0; r < R; r++) for (int i = 0; i < M; i++) {
                const float *sums = job->sums + 16 * ((m + i) * groups + g);
                for (int a = 0; a < A; a++) sum[r][i][a] = _mm256_setzero_ps();
                if (kind == INTEGERS) sum[r][i][0] = _mm256_sub_ps(sum[r][i][0], _mm256_loadu_ps(sums + 8));
                if (job->zeros || job->pairs) {  /* start at -z * sum(x) */
                    __m256 z = _mm256_set1_ps(zero_of(job, at + r * groups));
                    sum[r][i][0] = _mm256_fnmadd_ps(z, _mm256_loadu_ps(sums), sum[r][i][0]);
                }
            }
            for (int b = 0; b < blocks; b++) for (int h = 0; h < 2; h++) {
                if (group32 && h != pass) continue;
                for (int r = 0; r < R; r++) {
                    __m256 w[4];
                    const __m256i *here = (const __m256i *)(codes + r * (K / 2) + 32 * b);
                    __m256i code = _mm256_loadu_si256(here);
                    if (!h) PREFETCH(here);
                    if (h) code = _mm256_srli_epi16(code, 4);
                    decode(_mm256_and_si256(code, nibble), lut, kind, w);
                    for (int v = 0; v < 4; v++) for (int i = 0; i < M; i++) {
                        __m256 xv = _mm256_loadu_ps(x + i * K + 64 * b + 32 * h + 8 * v);
                        sum[r][i][v % A] = _mm256_fmadd_ps(w[v], xv, sum[r][i][v % A]);
                    }
                }
            }
            for (int r = 0; r < R; r++) for (int i = 0; i < M; i++) {
                if (A == 2) sum[r][i][0] = _mm256_add_ps(sum[r][i][0], sum[r][i][1]);
                total[r][i] = _mm256_fmadd_ps(sum[r][i][0], _mm256_set1_ps(scale_of(job, at + r * groups)), total[r][i]);
            }
        }
    }
    for (int r = 0; r < R; r++) for (int i = 0; i < M; i++)
        store(job->y, job->type, (size_t)(m + i) * job->N + n + r, horizontal_sum(total[r][i]));
}

/* ---- integers 0..15 with x in bfloat16 -----------------------------------------------------------------------------
 *
 * In each group x is held as x = 2^(E-13) * (256 * hi + lo), E the exponent of its largest value and hi, lo signed bytes:
 * exact for all that is at least a 64th of the largest, and rounded to 2^(E-13) below. `vpmaddubsw` then multiplies 32
 * codes by 32 bytes at once. Products and sums of a group are whole numbers, exact in 16 and 32 bits; only scaling and
 * adding up groups round.
 */

/* One row of x: K bytes of hi and of lo, 32 and 32 for each 32 codes in the order of their bytes; and for each group the
 * sum over lanes of 256 * hi + lo, and the unit 2^(E-13) in all lanes, NaN where x is not finite. */
static void fix(const float *x, size_t groups, int group, uint8_t *fixed, float *sums)
{
    const __m256i ones = _mm256_set1_epi16(1), round = _mm256_set1_epi16(128), low = _mm256_set1_epi32(0xffff);
    for (size_t g = 0; g < groups; g++, x += group, sums += 16) {
        __m256i largest = _mm256_setzero_si256(), sum = largest;
        for (int k = 0; k < group; k += 8) {  /* as whole numbers, so that a NaN is larger than all others */
            __m256i bits = _mm256_loadu_si256((const __m256i *)(x + k));
            largest = _mm256_max_epi32(largest, _mm256_and_si256(bits, _mm256_set1_epi32(0x7fffffff)));
        }
        __m128i top = _mm_max_epi32(_mm256_castsi256_si128(largest), _mm256_extracti128_si256(largest, 1));
        top = _mm_max_epi32(top, _mm_shuffle_epi32(top, 0x4e));
        top = _mm_max_epi32(top, _mm_shuffle_epi32(top, 0xb1));
        int exponent = _mm_cvtsi128_si32(top) >> 23;  /* E + 127 */
        const int finite = exponent < 255;
        if (exponent < 27) exponent = 27;  /* all below 1e-30: the inverse of the unit stays finite */
        const float unit = float_of((uint32_t)(exponent > 13 ? exponent - 13 : 1) << 23);
        const __m256 inverse = _mm256_set1_ps(finite ? float_of((uint32_t)(254 + 13 - exponent) << 23) : 0);
        for (int k = 0; k < group; k += 32, fixed += 64) {
            __m256i hi[2], lo[2];
            for (int h = 0; h < 2; h++) {
                __m256i even = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + k + 16 * h), inverse));
                __m256i odd = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + k + 16 * h + 8), inverse));
                __m256i words = _mm256_or_si256(_mm256_and_si256(even, low), _mm256_slli_epi32(odd, 16));
                sum = _mm256_add_epi32(sum, _mm256_madd_epi16(words, ones));
                hi[h] = _mm256_srai_epi16(_mm256_add_epi16(words, round), 8);
                lo[h] = _mm256_srai_epi16(_mm256_slli_epi16(words, 8), 8);
            }
            _mm256_storeu_si256((__m256i *)fixed, _mm256_packs_epi16(hi[0], hi[1]));
            _mm256_storeu_si256((__m256i *)(fixed + 32), _mm256_packs_epi16(lo[0], lo[1]));
        }
        _mm256_storeu_ps(sums, _mm256_cvtepi32_ps(sum));
        _mm256_storeu_ps(sums + 8, _mm256_set1_ps(finite ? unit : NAN));
    }
}

/* Row n of W with rows m .. m+M-1 of x as `fix` made them. A group is taken at most 256 codes at a time: 8 additions of
 * at most 2 * 15 * 128 to a word of 16 bits. */
INLINE void tile_fixed(const Job *job, int n, int m, int M, int group)
{
    const size_t K = (size_t)job->K, groups = (size_t)job->groups;
    const __m256i nibble = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
    const int group32 = group == 32, blocks = group32 ? 1 : group / 64, passes = group32 ? 2 : 1;
    const uint8_t *codes = job->codes + (size_t)n * (K / 2), *x = (const uint8_t *)job->x + 2 * m * K;
    __m256 total[4];
    for (int i = 0; i < M; i++) total[i] = _mm256_setzero_ps();

    for (size_t first = 0; first < groups; first += passes, codes += 32 * blocks, x += 128 * blocks) {
        for (int pass = 0; pass < passes; pass++) {  /* a group of 32 is half a block: the low nibbles, then the high */
            const size_t g = first + pass, at = (size_t)n * groups + g;
            const __m256 scale = _mm256_set1_ps(scale_of(job, at)), zero = _mm256_set1_ps(zero_of(job, at));
            __m256 dot[4];
            for (int i = 0; i < M; i++) {  /* start at -z * sum(x) */
                const float *sums = job->sums + 16 * ((m + i) * groups + g);
                dot[i] = _mm256_fnmadd_ps(zero, _mm256_loadu_ps(sums), _mm256_setzero_ps());
            }
            for (int start = 0; start < blocks; start += 4) {
                __m256i hi[4], lo[4];
                for (int i = 0; i < M; i++) hi[i] = lo[i] = _mm256_setzero_si256();
                for (int b = start; b < blocks && b < start + 4; b++) for (int h = 0; h < 2; h++) {
                    if (group32 && h != pass) continue;
                    const __m256i *here = (const __m256i *)(codes + 32 * b);
                    __m256i code = _mm256_loadu_si256(here);
                    if (!h) PREFETCH(here);
                    if (h) code = _mm256_srli_epi16(code, 4);
                    code = _mm256_and_si256(code, nibble);
                    for (int i = 0; i < M; i++) {
                        const __m256i *bytes = (const __m256i *)(x + 2 * i * K + 128 * b + 64 * h);
                        __m256i high = _mm256_maddubs_epi16(code, _mm256_loadu_si256(bytes));
                        __m256i low = _mm256_maddubs_epi16(code, _mm256_loadu_si256(bytes + 1));
                        hi[i] = _mm256_add_epi16(hi[i], high);
                        lo[i] = _mm256_add_epi16(lo[i], low);
                    }
                }
                for (int i = 0; i < M; i++) {
                    __m256i high = _mm256_slli_epi32(_mm256_madd_epi16(hi[i], ones), 8);
                    __m256i both = _mm256_add_epi32(high, _mm256_madd_epi16(lo[i], ones));
                    dot[i] = _mm256_add_ps(dot[i], _mm256_cvtepi32_ps(both));
                }
            }
            for (int i = 0; i < M; i++) {
                const __m256 unit = _mm256_loadu_ps(job->sums + 16 * ((m + i) * groups + g) + 8);
                total[i] = _mm256_fmadd_ps(dot[i], _mm256_mul_ps(scale, unit), total[i]);
            }
        }
    }
    for (int i = 0; i < M; i++) store(job->y, job->type, (size_t)(m + i) * job->N + n, horizontal_sum(total[i]));
}

/* Rows n .. end-1 of W with M rows of x from m. One row of W at a time streams best from memory; two, where arithmetic
 * is the limit, halve the traffic of x. G is the size of a group, or 0 for any: known sizes leave no loop in a group. */
#define SPAN(M, R, A, kind, G)                                                                  \
    static void span_##M##_##kind##_##G(const Job *job, int n, int end, int m)                  \
    {                                                                                           \
        const int group = G ? G : job->group;                                                   \
        const Lut lut = split_table(job->table, kind);                                          \
        for (; R > 1 && n + R <= end; n += R) tile(job, &lut, n, m, R, M, A, kind, group);      \
        for (; n < end; n++) tile(job, &lut, n, m, 1, M, A, kind, group);                       \
    }
#define SPAN_FIXED(M, G)                                                                        \
    static void span_##M##_FIXED_##G(const Job *job, int n, int end, int m)                     \
    {                                                                                           \
        for (; n < end; n++) tile_fixed(job, n, m, M, G ? G : job->group);                      \
    }
#define SPANS(kind, G) SPAN(1, 1, 2, kind, G) SPAN(2, 1, 2, kind, G) SPAN(4, 2, 1, kind, G)
#define SPANS_FIXED(G) SPAN_FIXED(1, G) SPAN_FIXED(2, G) SPAN_FIXED(4, G)
#define GROUPS(spans) spans(0) spans(32) spans(64) spans(128)
#define SPANS_HALF(G) SPANS(HALF, G)
#define SPANS_WIDE(G) SPANS(WIDE, G)
#define SPANS_INTEGERS(G) SPANS(INTEGERS, G)
GROUPS(SPANS_HALF) GROUPS(SPANS_WIDE) GROUPS(SPANS_INTEGERS) GROUPS(SPANS_FIXED)

typedef void Span(const Job *, int, int, int);
#define ENTRY(kind, G) {span_1_##kind##_##G, span_2_##kind##_##G, span_4_##kind##_##G}
#define ENTRIES(kind) {ENTRY(kind, 0), ENTRY(kind, 32), ENTRY(kind, 64), ENTRY(kind, 128)}
static Span *const SPAN_OF[4][4][3] = {ENTRIES(HALF), ENTRIES(WIDE), ENTRIES(INTEGERS), ENTRIES(FIXED)};

static int prepare(Job *job, float *x, float *sums, size_t M)
{
    const int kind = kind_of(job->table);
    if (kind == INTEGERS && job->type == BF16) {
        uint8_t *fixed = (uint8_t *)(sums + 16 * M * job->groups);
        for (size_t m = 0; m < M; m++)
            fix(x + m * job->K, job->groups, job->group, fixed + 2 * m * job->K, sums + 16 * m * job->groups);
        job->x = (const float *)fixed;
        return FIXED;
    }
    if (job->zeros || job->pairs) summarise(x, M * job->groups, job->group, sums, 0);
    arrange(x, M * job->K, kind);
    if (kind == INTEGERS) summarise(x, M * job->groups, job->group, sums, 1);
    return kind;
}

static void multiply(const Job *job, int kind, int n, int end, int M)
{
    const int size = job->group == 32 ? 1 : job->group == 64 ? 2 : job->group == 128 ? 3 : 0;
    Span *const *span = SPAN_OF[kind][size];
    int m = 0;
    for (; m + 4 <= M; m += 4) span[2](job, n, end, m);
    if (m + 2 <= M) span[1](job, n, end, m), m += 2;
    if (m < M) span[0](job, n, end, m);
}

#else  /* any other machine: one code at a time, summed up in double precision, so that no group overflows */

static int prepare(Job *job, float *x, float *sums, size_t M)
{
    (void)job, (void)x, (void)sums, (void)M;
    return 0;
}

static void multiply(const Job *job, int kind, int n, int end, int M)
{
    (void)kind;
    for (; n < end; n++) for (int m = 0; m < M; m++) {
        const uint8_t *codes = job->codes + (size_t)n * (job->K / 2);
        double total = 0;
        for (int g = 0; g < job->groups; g++) {
            const size_t at = (size_t)n * job->groups + g;
            const double zero = zero_of(job, at);
            double sum = 0;
            for (int k = g * job->group; k < (g + 1) * job->group; k++) {
                uint8_t byte = codes[32 * (k / 64) + 16 * (k >> 2 & 1) + 8 * (k >> 4 & 1) + 2 * (k & 3) + (k >> 3 & 1)];
                sum += (job->table[k & 32 ? byte >> 4 : byte & 15] - zero) * job->x[(size_t)m * job->K + k];
            }
            total += sum * scale_of(job, at);
        }
        store(job->y, job->type, (size_t)m * job->N + n, (float)total);
    }
}

#endif

const char *lut4_isa(void)
{
#ifdef LUT4_AVX2
    return "avx2";
#else
    return "portable";
#endif
}

/* x (M, K) and y (M, N) of `type`; scales, zeros (N, K/group) fp32, zeros may be NULL, and both are where pairs are given.
 * K % 64 == 0, K % group == 0 and group == 32 or group % 64 == 0: the caller checks. */
int lut4_matmul(const void *x, const uint8_t *codes, const float *table, const float *scales, const float *zeros,
                const uint32_t *pairs, void *y, int type, int M, int N, int K, int group, int threads)
{
    const size_t count = (size_t)M * K, groups = (size_t)K / group, floats = count + 16 * M * groups;
    float *scratch = aligned_alloc(64, (floats * sizeof(float) + 2 * count) / 64 * 64 + 64);
    if (!scratch) return NO_MEMORY;
    Job job = {scratch, scratch + count, codes, table, scales, zeros, pairs, y, type, N, K, group, (int)groups};
    to_float(x, type, count, scratch);
    const int kind = prepare(&job, scratch, scratch + count, M), step = 8;
    #pragma omp parallel for schedule(static) num_threads(threads)
    for (int n = 0; n < N; n += step) multiply(&job, kind, n, n + step < N ? n + step : N, M);
    free(scratch);
    return OK;
}
