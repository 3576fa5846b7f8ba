// The roll-out of a Gaussian-mixture policy, forward and backward, for blocks of W factors at a time.
//
// A programme (programme.py) of R rows runs on every factor's own state. Row r, with its numbers λ, α, β, a, b_j, a', b'_j:
//
//     η = α X + β x_src,    D_r = E[x_0] = Σ_k p_k ρ_k (μ_k + v_k η),    ρ_k = 1/(1 + λ v_k),
//     p = softmax_k(log A_k + (C/2) log ρ_k + ρ_k (2 μ_k·η - λ‖μ_k‖² + v_k‖η‖²)/2)          (mixture.py; Eqs. 24-28)
//     base = X  or  base = a' base + Σ_j b'_j D_{r-j}  or base as it is,
//     X = a base + Σ_j b_j D_{r-j}
//
// One lane of a vector is one factor. Its parameters are read once and stay in the first-level cache; nothing is written
// but the states at the stops. The means are kept about a centre c: with μ' = μ - c and η' = η - λc all formulas hold with
// μ' and η' for μ and η, and D - c for D. Rounding of the logits grows with |η'||μ'|, so c follows the posterior: where that
// product has grown too large, c becomes the posterior mean of a Gaussian as wide as the mixture.
//
// The backward runs the rows once more, keeps their X (R x C numbers a lane, in cache), and goes through them in reverse:
// with D̄ the adjoint of D_r, q_k = D̄·μ'_k, and δ_k = p_k (s_k - Σ p s), s_k = ρ_k (q_k + v_k D̄·η') that of the logits,
//
//     μ̄_k += ρ_k (p_k D̄ + δ_k (η' - λμ'_k)),    η̄ = Σ_k ρ_k (v_k p_k D̄ + δ_k (μ'_k + v_k η')),    log Ā_k += δ_k
//
// In place of a programme, each lane may choose its own steps (`Travel`, `adaptive`): forward only.

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

typedef float Floats __attribute__((vector_size(64)));
typedef double Doubles __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef int64_t Longs __attribute__((vector_size(64)));  // or a mask of doubles: -1 and 0

template <class V> struct Of;
template <> struct Of<Floats> {
    typedef float S;
    static const int W = 16;
    static constexpr float absent = -3e38f;  // the log-weight of a component that is not there
};
template <> struct Of<Doubles> {
    typedef double S;
    static const int W = 8;
    static constexpr double absent = -1e300;
};

template <class V> INLINE V all(double value) { return V{} + (typename Of<V>::S)value; }

INLINE Floats larger(Floats a, Floats b) {
#if defined(__AVX512F__)
    return (Floats)_mm512_max_ps((__m512)a, (__m512)b);
#else
    return a > b ? a : b;
#endif
}
INLINE Doubles larger(Doubles a, Doubles b) { return a > b ? a : b; }

// 2^x for x <= 0: a polynomial of the fraction, in [-1/2, 1/2], and the whole part in the exponent. Not below 2^-100:
// smaller weights change nothing, and products with subnormal numbers take a hundred cycles.
INLINE Floats power_of_two(Floats x) {
    x = larger(all<Floats>(-100), x);  // in this order, NaN stays
#if defined(__AVX512F__)
    Floats whole = (Floats)_mm512_roundscale_ps((__m512)x, 8);
#else
    Floats magic = all<Floats>(12582912.0), whole = (x + magic) - magic;
#endif
    Floats f = x - whole;
    Floats y = all<Floats>(1.3398874e-3);
    y = y * f + 9.6184373e-3f;
    y = y * f + 5.5503324e-2f;
    y = y * f + 2.4022648e-1f;
    y = y * f + 6.9314718e-1f;
    y = y * f + 1.0f;
#if defined(__AVX512F__)
    return (Floats)_mm512_scalef_ps((__m512)y, (__m512)whole);
#else
    return y * (Floats)((__builtin_convertvector(whole, Ints) + 127) << 23);
#endif
}
INLINE Doubles power_of_two(Doubles x) {
    for (int i = 0; i < 8; i++) x[i] = std::exp2(x[i]);
    return x;
}

template <class V> INLINE V binary_log(V x) {
    for (int i = 0; i < Of<V>::W; i++) x[i] = std::log2(x[i]);
    return x;
}

// Whether a > b in any lane.
INLINE bool any_above(Floats a, Floats b) {
#if defined(__AVX512F__)
    return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ) != 0;
#else
    bool any = false;
    for (int i = 0; i < 16; i++) any |= a[i] > b[i];
    return any;
#endif
}
INLINE bool any_above(Doubles a, Doubles b) {
    bool any = false;
    for (int i = 0; i < 8; i++) any |= a[i] > b[i];
    return any;
}

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define HAS_SHUFFLE 1
#endif
#endif

// rows[i][j] <-> rows[j][i]
INLINE void transpose(Floats rows[16]) {
#ifdef HAS_SHUFFLE
#define PAIRS(s, low, high)                                     \
    UNROLL                                                      \
    for (int i = 0; i < 16; i++)                                \
        if (!(i & s)) {                                         \
            Floats a = rows[i], b = rows[i + s];                \
            rows[i] = __builtin_shufflevector(a, b, low);       \
            rows[i + s] = __builtin_shufflevector(a, b, high);  \
        }
#define L1 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30
#define H1 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31
#define L2 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29
#define H2 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31
#define L4 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27
#define H4 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31
#define L8 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23
#define H8 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31
    PAIRS(1, L1, H1)
    PAIRS(2, L2, H2)
    PAIRS(4, L4, H4)
    PAIRS(8, L8, H8)
#else
    for (int i = 0; i < 16; i++)
        for (int j = 0; j < i; j++) {
            float a = rows[i][j];
            rows[i][j] = rows[j][i];
            rows[j][i] = a;
        }
#endif
}
INLINE void transpose(Doubles rows[8]) {
    for (int i = 0; i < 8; i++)
        for (int j = 0; j < i; j++) {
            double a = rows[i][j];
            rows[i][j] = rows[j][i];
            rows[j][i] = a;
        }
}

// The first `count` numbers at `from`, and 0; and the way back.
INLINE void load_some(const float *from, int count, Floats *to) {
#if defined(__AVX512F__)
    *to = (Floats)_mm512_maskz_loadu_ps((__mmask16)((1u << count) - 1), from);
#else
    *to = Floats{};
    memcpy(to, from, count * sizeof(float));
#endif
}
INLINE void load_some(const double *from, int count, Doubles *to) {
    *to = Doubles{};
    memcpy(to, from, count * sizeof(double));
}
INLINE void store_some(float *to, int count, Floats from) {
#if defined(__AVX512F__)
    _mm512_mask_storeu_ps(to, (__mmask16)((1u << count) - 1), (__m512)from);
#else
    memcpy(to, &from, count * sizeof(float));
#endif
}
INLINE void store_some(double *to, int count, Doubles from) { memcpy(to, &from, count * sizeof(double)); }

enum Kind { FORWARD, BACKWARD, ADAPTIVE };

// What Python hands over (native.py holds the same list). Sizes and strides in elements.
struct Job {
    int64_t factors, components, channels, rows, history, times, stops, factors_per_time, numbers, own_variance, threads;
    int64_t most;
    int64_t means_n, means_k, means_c, weights_n, weights_k, variance_n, variance_k;
    const void *means, *log_weights, *variance, *x_src, *x, *coefficients;
    const int32_t *commits, *stop_rows;
    void *out;                                                                    // [M, N, C]
    const void *out_bar;                                                          // its adjoint
    void *means_bar, *log_weights_bar, *variance_bar, *x_src_bar, *x_bar;         // [N, C, K], [N, K], [N, K], [N, C] twice
    const double *travels;                                                        // [8, N], `Travel`'s, and t_src
    int32_t *evaluations, *stage;                                                 // [N] twice
    double *failed_at;                                                            // [N]
    double tol;
};

static const double LOG2E = 1.4426950408889634;
static const int MOST_KNOWN = 6;  // D's, by adaptive steps

INLINE Doubles smaller(Doubles a, Doubles b) { return a < b ? a : b; }

INLINE bool any(Longs mask) {
#if defined(__AVX512F__)
    return _mm512_test_epi64_mask((__m512i)mask, (__m512i)mask) != 0;
#else
    int64_t all = 0;
    for (int i = 0; i < 8; i++) all |= mask[i];
    return all != 0;
#endif
}

// q^(1/n) for q in [1e-30, 1e30], within 1e-12 of itself: from the logarithm of a mantissa around 1, to base 2.
INLINE Doubles root(Doubles q, Doubles n) {
    const Longs whole = ((Longs)q - 0x3FE6A09E667F3BCD) >> 52;
    const Doubles m = (Doubles)((Longs)q - (whole << 52)), z = (m - 1) / (m + 1), square = z * z;
    Doubles y = all<Doubles>(1.0 / 13);
    UNROLL
    for (int odd = 11; odd > 0; odd -= 2) y = y * square + 1.0 / odd;
    const Doubles x = (__builtin_convertvector(whole, Doubles) + 2 * LOG2E * z * y) / n;
    const Doubles shifted = x + 6755399441055744.0, f = (x - (shifted - 6755399441055744.0)) * (1 / LOG2E);
    y = all<Doubles>(1);
    UNROLL
    for (int term = 11; term > 0; term--) y = y * (f * (1.0 / term)) + 1;
    return (Doubles)((Longs)y + ((Longs)shifted << 52));
}

// Eight lanes of a vector, in double, and the way back.
INLINE Doubles widen(const Floats &from, int part) {
    float some __attribute__((vector_size(32)));
    memcpy(&some, (const float *)&from + 8 * part, sizeof some);
    return __builtin_convertvector(some, Doubles);
}
INLINE Doubles widen(const Doubles &from, int) { return from; }
INLINE void narrow(Doubles from, int part, Floats *to) {
    float some __attribute__((vector_size(32))) = __builtin_convertvector(from, decltype(some));
    memcpy((float *)to + 8 * part, &some, sizeof some);
}
INLINE void narrow(Doubles from, int, Doubles *to) { *to = from; }

// Where eight lanes are, and their next step: solvers/embedded.py, whose names and numbers these are.
struct Travel {
    Doubles a, b, c, d, t_dst, t, step, t_src;
    Doubles v_dst, v_to, to, keep, known, nodes[MOST_KNOWN], moments[MOST_KNOWN + 1];
    Longs moves;

    static constexpr double SAFETY = 0.8, SHRINK = 0.2, GROW = 1.5, LONGEST = 0.28, CORRECTION = 0.3;
    static constexpr double LATE = 0.5, EARLY = 0.07;

    static Doubles apart(Doubles v, Doubles u) { return (v - u) / (1 - v * u / 4); }
    Doubles v_of(Doubles t) const { return (a + b * t) / (c + d * t); }
    Doubles t_of(Doubles v) const { return (c * v - a) / (b - d * v); }

    void measure(int order) {
        static const double at[4] = {0.06943184420297371, 0.33000947820757187, 0.6699905217924281, 0.9305681557970262};
        static const double inner = 0.3260725774312732, weight[4] = {0.5 - inner, inner, inner, 0.5 - inner};
        Doubles v[4], product[4];
        keep = to / t;
        moments[0] = 1 - keep;
        UNROLL
        for (int g = 0; g < 4; g++) {
            const Doubles below = at[g] * t + (1 - at[g]) * to, above = t * to;  // of the time there
            v[g] = (a * below + b * above) / (c * below + d * above);
            product[g] = weight[g] * moments[0];
        }
        for (int j = 0; j < order; j++) {
            UNROLL
            for (int g = 0; g < 4; g++) product[g] *= v[g] - nodes[j];
            moments[j + 1] = (product[0] + product[1]) + (product[2] + product[3]);
        }
    }

    // The j-th moment where so many are known, and 0 elsewhere.
    Doubles term(int j, Doubles count) const { return count == all<Doubles>(j) ? moments[j] : Doubles{}; }

    // The square of the error that differences of this mean square are.
    Doubles error(Doubles square) const {
        const Doubles late = LATE / (t + EARLY);
        return late * late * square;
    }

    // By what a step is to be multiplied for the error to become `tol`, from the squares of both.
    static Doubles factor(double tol, Doubles error, Doubles order, double most) {
        const Doubles q = larger(smaller(tol / error, all<Doubles>(1e30)), all<Doubles>(1e-30));
        return larger(smaller(SAFETY * root(q, 2 * order), all<Doubles>(most)), all<Doubles>(SHRINK));
    }
};

template <class V, bool OWN> struct Block {
    typedef typename Of<V>::S S;
    static const int W = Of<V>::W;

    const Job &job;
    const int K, C, Kp, H;
    std::vector<V> memory;
    V *mu, *mu_c, *square, *weight, *e, *p, *own, *rho, *own_log, *mean, *centre, *x_src, *x, *base, *eta, *eta_c, *d;
    V *bar_mu, *bar_weight, *bar_variance, *bar_x_src, *bar_x, *bar_base, *bar_d, *bar_eta, *visited, *u, *z, *fresh;
    V variance, width, bound, rho_all;
    int64_t index[W];     // the factor in each lane; lanes past the end repeat the last one
    int lanes;            // how many are real
    bool by_lane;         // whether lanes differ in time
    int64_t time;         // the row of times, or that of lane 0

    Block(const Job &job, Kind kind)
        : job(job), K(job.components), C(job.channels), Kp((K + 3) / 4 * 4), H(job.history) {
        size_t kc = (size_t)Kp * C;
        size_t size = 2 * kc + 7 * Kp + (8 + H) * C;
        if (kind == ADAPTIVE) size += (1 + H) * C;
        if (kind == BACKWARD) size += kc + 4 * Kp + (4 + H) * C + (size_t)job.rows * C;
        memory.assign(size + 1, V{});
        V *next = memory.data();
        next = (V *)(((uintptr_t)next + 63) & ~(uintptr_t)63);
        auto take = [&](size_t n) { V *start = next; next += n; return start; };
        mu = take(kc); mu_c = take(kc);
        square = take(Kp); weight = take(Kp); e = take(Kp); p = take(Kp); own = take(Kp); rho = take(Kp); own_log = take(Kp);
        mean = take(C); centre = take(C); x_src = take(C); x = take(C); base = take(C); eta = take(C); eta_c = take(C);
        d = take((size_t)H * C); take(C);
        if (kind == ADAPTIVE) fresh = take((1 + H) * C);
        if (kind == BACKWARD) {
            bar_mu = take(kc); bar_weight = take(Kp); bar_variance = take(Kp); u = take(Kp); z = take(Kp);
            bar_x_src = take(C); bar_x = take(C); bar_base = take(C); bar_eta = take(C); bar_d = take((size_t)H * C);
            visited = take((size_t)job.rows * C);
        }
    }

    V number(int64_t row, int64_t which) const {
        const S *at = (const S *)job.coefficients + (row * job.numbers + which) * job.times + time;
        if (!by_lane) return V{} + *at;
        V value;
        if (lanes == W) {
            memcpy(&value, at, sizeof value);
        } else {
            for (int i = 0; i < W; i++) value[i] = at[i < lanes ? i : lanes - 1];
        }
        return value;
    }

    // `size` numbers of each lane's factor, `stride` apart, W at a time through a transposed tile; `to` in order.
    void read(const void *from, int64_t stride, int64_t step, int size, V *to) {
        const S *source = (const S *)from;
        if (step != 1) {
            for (int n = 0; n < size; n++)
                for (int i = 0; i < W; i++) to[n][i] = source[index[i] * stride + n * step];
            return;
        }
        for (int n = 0; n < size; n += W) {
            const int count = size - n < W ? size - n : W;
            V tile[W];
            for (int i = 0; i < W; i++) load_some(source + index[i] * stride + n, count, &tile[i]);
            transpose(tile);
            for (int i = 0; i < count; i++) to[n + i] = tile[i];
        }
    }

    void write(void *to, int64_t stride, int size, const V *from) {
        S *target = (S *)to;
        for (int n = 0; n < size; n += W) {
            const int count = size - n < W ? size - n : W;
            V tile[W] = {};
            for (int i = 0; i < count; i++) tile[i] = from[n + i];
            transpose(tile);
            for (int i = 0; i < lanes; i++) store_some(target + index[i] * stride + n, count, tile[i]);
        }
    }

    // Means [N, C, K], K innermost, to rows of Kp for each channel.
    void read_means() {
        if (job.means_k == 1 && job.means_c == K) {
            read(job.means, job.means_n, 1, K * C, mu);
            if (Kp > K)
                for (int c = C; c-- > 0;)
                    for (int k = K; k-- > 0;) mu[c * Kp + k] = mu[c * K + k];
        } else {
            for (int c = 0; c < C; c++)
                read((const S *)job.means + c * job.means_c, job.means_n, job.means_k, K, mu + c * Kp);
        }
    }

    void write_means_bar() {
        for (int c = 1; Kp > K && c < C; c++)
            for (int k = 0; k < K; k++) bar_mu[c * K + k] = bar_mu[c * Kp + k];
        write(job.means_bar, (int64_t)K * C, K * C, bar_mu);
    }

    void load() {
        read_means();
        read(job.log_weights, job.weights_n, job.weights_k, K, weight);
        for (int k = 0; k < K; k++) {
            weight[k] *= (S)LOG2E;
            weight[k] = larger(weight[k], all<V>(Of<V>::absent));
        }
        for (int k = K; k < Kp; k++) weight[k] = all<V>(Of<V>::absent);
        V widest = {};
        if (OWN) {
            read(job.variance, job.variance_n, job.variance_k, K, own);
            for (int k = 0; k < K; k++) widest = larger(widest, own[k]);
        } else {
            read(job.variance, job.variance_n, 0, 1, &variance);
            widest = variance;
        }
        V far[1] = {};
        for (int c = 0; c < C; c++) {
            V sum = {};
            for (int k = 0; k < K; k++) sum += mu[c * Kp + k];
            mean[c] = sum * (S)(1.0 / K);
            for (int k = K; k < Kp; k++) mu[c * Kp + k] = mean[c];  // what is not there lies in the middle
        }
        recentre(mean);
        for (int k = 0; k < K; k++) far[0] = larger(far[0], square[k]);
        width = far[0] * (S)(1.0 / C) + widest;
        // ρ|η'| sqrt(C w) above 8 + C calls for a new centre
        bound = all<V>((8.0 + C) * (8.0 + C) / C) / (width + (S)1e-30);
        read(job.x_src, C, 1, C, x_src);
        read(job.x, C, 1, C, x);
        for (int c = 0; c < C; c++) base[c] = x[c];
        for (int n = 0; n < H * C; n++) d[n] = V{};
    }

    void recentre(const V *to) {
        for (int k = 0; k < Kp; k++) square[k] = V{};
        for (int c = 0; c < C; c++) {
            V here = centre[c] = to[c];
            for (int k = 0; k < Kp; k++) {
                V m = mu[c * Kp + k] - here;
                mu_c[c * Kp + k] = m;
                square[k] += m * m;
            }
        }
    }

    // e_k = μ'_k·η' - λ/2 ‖μ'_k‖² for G components; the logits, in base 2, to p; their maximum comes back.
    template <int G> INLINE V logits(Block &b, int k, V half, V scale, V top) {
        V sum[G];
        UNROLL
        for (int g = 0; g < G; g++) sum[g] = -half * b.square[k + g];
        for (int c = 0; c < b.C; c++) {
            V eta = b.eta_c[c];
            const V *m = b.mu_c + c * b.Kp + k;
            UNROLL
            for (int g = 0; g < G; g++) sum[g] += eta * m[g];
        }
        UNROLL
        for (int g = 0; g < G; g++) {
            b.e[k + g] = sum[g];
            V logit = OWN ? b.weight[k + g] + b.own_log[k + g] + b.rho[k + g] * (S)LOG2E * sum[g] : b.weight[k + g] + scale * sum[g];
            b.p[k + g] = logit;
            top = larger(top, logit);
        }
        return top;
    }

    // Σ_k weights_k μ'_k for G channels, in U chains each.
    template <int G, int U> INLINE void weighted(const Block &b, const V *weights, int c, V *sums) {
        V sum[G][U];
        UNROLL
        for (int g = 0; g < G; g++)
            UNROLL
            for (int u = 0; u < U; u++) sum[g][u] = V{};
        for (int k = 0; k < b.Kp; k += U)
            UNROLL
            for (int u = 0; u < U; u++) {
                V w = weights[k + u];
                UNROLL
                for (int g = 0; g < G; g++) sum[g][u] += w * b.mu_c[(c + g) * b.Kp + k + u];
            }
        UNROLL
        for (int g = 0; g < G; g++) {
            V total = sum[g][0];
            UNROLL
            for (int u = 1; u < U; u++) total += sum[g][u];
            sums[c + g] = total;
        }
    }

    INLINE void weighted_all(const Block &b, const V *weights, V *sums) {
        int c = 0;
        for (; c + 8 <= b.C; c += 8) weighted<8, 1>(b, weights, c, sums);
        for (; c + 4 <= b.C; c += 4) weighted<4, 2>(b, weights, c, sums);
        for (; c + 2 <= b.C; c += 2) weighted<2, 4>(b, weights, c, sums);
        for (; c < b.C; c++) weighted<1, 4>(b, weights, c, sums);
    }

    void evaluate(const V *state, int64_t row, V *to) {
        evaluate(state, number(row, 0), number(row, 1), number(row, 2), to);
    }

    // D at X into `to`. Leaves η', e, and the normalised p.
    void evaluate(const V *state, const V lambda, const V alpha, const V beta, V *to) {
        V length = {};
        for (int c = 0; c < C; c++) {
            eta[c] = alpha * state[c] + beta * x_src[c];
            eta_c[c] = eta[c] - lambda * centre[c];
            length += eta_c[c] * eta_c[c];
        }
        if (!OWN) rho_all = 1 / (1 + lambda * variance);
        V shrink = OWN ? all<V>(1) : rho_all;
        if (__builtin_expect(any_above(length * shrink * shrink, bound), 0)) {
            const V share = 1 / (1 + lambda * width);
            for (int c = 0; c < C; c++) eta_c[c] = (mean[c] + width * eta[c]) * share;
            recentre(eta_c);
            length = V{};
            for (int c = 0; c < C; c++) {
                eta_c[c] = (eta[c] - lambda * mean[c]) * share;
                length += eta_c[c] * eta_c[c];
            }
        }
        if (OWN)
            for (int k = 0; k < K; k++) {
                rho[k] = 1 / (1 + lambda * own[k]);
                own_log[k] = (S)(0.5 * C) * binary_log(rho[k]) + (S)(0.5 * LOG2E) * rho[k] * own[k] * length;
            }
        const V half = lambda * (S)0.5, scale = rho_all * (S)LOG2E;
        V top = all<V>(-INFINITY);
        int k = 0;
        for (; k + 8 <= Kp; k += 8) top = logits<8>(*this, k, half, scale, top);
        if (k < Kp) top = logits<4>(*this, k, half, scale, top);
        V sum[4] = {};
        for (k = 0; k < Kp; k += 4)
            UNROLL
            for (int g = 0; g < 4; g++) sum[g] += p[k + g] = power_of_two(p[k + g] - top);
        const V share = 1 / ((sum[0] + sum[1]) + (sum[2] + sum[3]));
        if (OWN) {
            V lift = {};
            for (k = 0; k < Kp; k++) {
                p[k] *= share;
                e[k] = p[k] * rho[k];
                lift += e[k] * own[k];
            }
            weighted_all(*this, e, to);
            for (int c = 0; c < C; c++) to[c] = centre[c] + to[c] + lift * eta_c[c];
        } else {
            weighted_all(*this, p, to);
            const V scaled = share * rho_all, lift = rho_all * variance;
            for (int c = 0; c < C; c++) to[c] = centre[c] + scaled * to[c] + lift * eta_c[c];
        }
        normaliser = share;
    }
    V normaliser;

    V *older(V *ring, int64_t row, int j) const { return ring + ((row - j) & (H - 1)) * C; }

    // The commit and the move of a row whose D is known.
    void advance(int64_t row) {
        if (H == 1) {
            const V a = number(row, 3), b = number(row, 4);
            for (int c = 0; c < C; c++) x[c] = a * x[c] + b * d[c];
            return;
        }
        if (job.commits[row] == 1)
            for (int c = 0; c < C; c++) base[c] = x[c];
        else if (job.commits[row] == 2)
            combine(row, 4 + H, base, base);
        combine(row, 3, base, x);
    }

    void combine(int64_t row, int64_t first, const V *from, V *to) {
        const V a = number(row, first);
        V b[4];
        UNROLL
        for (int j = 0; j < 4; j++) b[j] = number(row, first + 1 + j);
        for (int c = 0; c < C; c++) {
            V sum = a * from[c];
            UNROLL
            for (int j = 0; j < 4; j++) sum += b[j] * older(d, row, j)[c];
            to[c] = sum;
        }
    }

    bool stopped(int64_t m, int i, int64_t row) const {
        return job.stop_rows[m * job.times + time + (by_lane ? i : 0)] == row;
    }

    void put_stops(int64_t row) {
        S *out = (S *)job.out;
        for (int64_t m = 0; m < job.stops; m++)
            if (!by_lane) {
                if (stopped(m, 0, row)) write(out + m * job.factors * C, C, C, x);
            } else {
                for (int i = 0; i < lanes; i++)
                    if (stopped(m, i, row))
                        for (int c = 0; c < C; c++) out[(m * job.factors + index[i]) * C + c] = x[c][i];
            }
    }

    void forward() {
        load();
        put_stops(0);
        for (int64_t row = 0; row < job.rows; row++) {
            evaluate(x, row, older(d, row, 0));
            advance(row);
            put_stops(row + 1);
        }
    }

    void take_stops(int64_t row) {
        const S *bar = (const S *)job.out_bar;
        for (int64_t m = 0; m < job.stops; m++)
            for (int i = 0; i < lanes; i++)
                if (stopped(m, i, row))
                    for (int c = 0; c < C; c++) bar_x[c][i] += bar[(m * job.factors + index[i]) * C + c];
    }

    // The adjoint of `combine`: from that of its result, which is over with, to those of base and of the D's.
    void combine_bar(int64_t row, int64_t first, V *bar, bool keep) {
        const V a = number(row, first);
        V b[4];
        UNROLL
        for (int j = 0; j < 4; j++) b[j] = number(row, first + 1 + j);
        for (int c = 0; c < C; c++) {
            UNROLL
            for (int j = 0; j < 4; j++) older(bar_d, row, j)[c] += b[j] * bar[c];
            bar_base[c] = keep ? bar_base[c] + a * bar[c] : a * bar[c];
        }
    }

    // The adjoint of one evaluation, that of D in `bar`.
    void evaluate_bar(int64_t row, const V *bar) {
        evaluate(visited + row * C, row, base);
        const V lambda = number(row, 0), alpha = number(row, 1), beta = number(row, 2);
        V length = {}, along = {};
        for (int c = 0; c < C; c++) {
            length += eta_c[c] * eta_c[c];
            along += bar[c] * eta_c[c];
        }
        V mean_s = {}, lift = {}, tilt = {};
        for (int k = 0; k < Kp; k++) {
            V q = {}, dot = {};
            for (int c = 0; c < C; c++) {
                q += bar[c] * mu_c[c * Kp + k];
                if (OWN) dot += eta_c[c] * mu_c[c * Kp + k];
            }
            if (OWN) e[k] = dot - (S)0.5 * lambda * square[k];
            else p[k] *= normaliser;
            u[k] = q;
            z[k] = OWN ? rho[k] * (q + own[k] * along) : rho_all * q;
            mean_s += p[k] * z[k];
        }
        for (int k = 0; k < Kp; k++) {
            const V r = OWN ? rho[k] : rho_all, v = OWN ? own[k] : variance, delta = p[k] * (z[k] - mean_s);
            bar_weight[k] += delta;
            bar_variance[k] += p[k] * r * (along - lambda * r * (u[k] + v * along)) +
                               delta * r * ((S)0.5 * length - lambda * ((S)(0.5 * C) + r * (e[k] + (S)0.5 * v * length)));
            u[k] = r * p[k];
            z[k] = r * delta;
            lift += v * u[k];
            tilt += v * z[k];
        }
        for (int c = 0; c < C; c++) {
            const V here = bar[c], slope = eta_c[c];
            V sum[2] = {};
            for (int k = 0; k < Kp; k += 2)
                UNROLL
                for (int g = 0; g < 2; g++) {
                    const V m = mu_c[c * Kp + k + g];
                    sum[g] += z[k + g] * m;
                    bar_mu[c * Kp + k + g] += u[k + g] * here + z[k + g] * (slope - lambda * m);
                }
            const V eta_bar = sum[0] + sum[1] + lift * here + tilt * slope;
            bar_x[c] += alpha * eta_bar;
            bar_x_src[c] += beta * eta_bar;
        }
    }

    void backward() {
        load();
        for (int64_t row = 0; row < job.rows; row++) {
            for (int c = 0; c < C; c++) visited[row * C + c] = x[c];
            evaluate(x, row, older(d, row, 0));
            advance(row);
        }
        for (int n = 0; n < Kp * C; n++) bar_mu[n] = V{};
        for (int k = 0; k < Kp; k++) bar_weight[k] = bar_variance[k] = V{};
        for (int c = 0; c < C; c++) bar_x_src[c] = bar_x[c] = bar_base[c] = V{};
        for (int n = 0; n < H * C; n++) bar_d[n] = V{};
        for (int64_t row = job.rows; row-- > 0;) {
            take_stops(row + 1);
            V *bar = older(bar_d, row, 0);
            if (H == 1) {
                const V a = number(row, 3), b = number(row, 4);
                for (int c = 0; c < C; c++) {
                    bar[c] = b * bar_x[c];
                    bar_x[c] = a * bar_x[c];
                }
            } else {
                combine_bar(row, 3, bar_x, true);
                for (int c = 0; c < C; c++) bar_x[c] = V{};
                if (job.commits[row] == 1)
                    for (int c = 0; c < C; c++) {
                        bar_x[c] = bar_base[c];
                        bar_base[c] = V{};
                    }
                else if (job.commits[row] == 2)
                    combine_bar(row, 4 + H, bar_base, false);
            }
            evaluate_bar(row, bar);
            if (H > 1)
                for (int c = 0; c < C; c++) bar[c] = V{};
        }
        take_stops(0);
        for (int c = 0; c < C; c++) bar_x[c] += bar_base[c];
        if (job.means_bar) write_means_bar();
        write(job.log_weights_bar, K, K, bar_weight);
        write(job.variance_bar, K, K, bar_variance);
        write(job.x_src_bar, C, C, bar_x_src);
        write(job.x_bar, C, C, bar_x);
    }

    // λ, α, β at the lanes' times, as in programme.py, and D at X into `to`.
    void evaluate_at(const Doubles *times, const Travel *travel, const V *state, V *to) {
        V lambda, alpha, beta;
        for (int h = 0; h < W / 8; h++) {
            const Doubles source = travel[h].t_src, t = smaller(times[h], source);
            const Doubles share = (source - t) / (t * source * (t * source)), seen = (1 - t) / (t * t);
            narrow(share * (source + t - 2 * t * source), h, &lambda);
            narrow(seen, h, &alpha);
            narrow(share * (source + t - t * source) - seen, h, &beta);
        }
        evaluate(state, lambda, alpha, beta, to);
    }

    V mean_square(const V *values) const {
        V sum[4] = {};
        for (int c = 0; c < C; c += 4)
            UNROLL
            for (int g = 0; g < 4; g++)
                if (c + g < C) sum[g] += values[c + g] * values[c + g];
        return ((sum[0] + sum[1]) + (sum[2] + sum[3])) * (S)(1.0 / C);
    }

    // The lanes whose error is not finite go no further.
    void stop(int h, Travel &l, Doubles error, int32_t stage) {
        const Longs failed = l.moves & ~(Longs)(error < INFINITY);
        l.moves &= ~failed;
        for (int i = 0; any(failed) && i < 8; i++)
            if (failed[i]) {
                job.stage[index[8 * h + i]] = stage;
                job.failed_at[index[8 * h + i]] = l.t[i];
            }
    }

    void arrive(int h, Longs done, int32_t evaluations) {
        for (int i = 0; any(done) && i < 8; i++)
            if (done[i]) {
                const int lane = 8 * h + i;
                job.evaluations[index[lane]] = evaluations;
                for (int c = 0; c < C; c++) ((S *)job.out)[index[lane] * C + c] = x[c][lane];
            }
    }

    // Rounds of one evaluation for every lane that has not arrived; the others stand still, at a step of no length.
    void adaptive() {
        Travel travel[W / 8];
        Doubles times[W / 8];
        load();
        for (int h = 0; h < W / 8; h++) {
            Travel &l = travel[h];
            Doubles *numbers[8] = {&l.a, &l.b, &l.c, &l.d, &l.t_dst, &l.t, &l.step, &l.t_src};
            for (int n = 0; n < 8; n++)
                for (int i = 0; i < 8; i++) (*numbers[n])[i] = job.travels[n * job.factors + index[8 * h + i]];
            l.moves = (Longs)(l.t_dst < l.t);
            l.v_dst = l.v_of(l.t_dst);
            l.known = all<Doubles>(1);
            for (int j = 0; j < H; j++) l.nodes[j] = Doubles{};
            l.nodes[0] = l.v_of(l.t);
            times[h] = l.t;
            arrive(h, ~l.moves, 0);
        }
        evaluate_at(times, travel, x, d);
        for (int32_t evaluations = 1; predict(travel, evaluations); evaluations++) correct(travel, evaluations);
    }

    // The states at the ends of the steps; whether a lane has not arrived.
    bool predict(Travel *travel, int32_t evaluations) {
        const double tol = job.tol * job.tol;
        V last[MOST_KNOWN], moment[MOST_KNOWN], keep;
        Longs lands[W / 8], done[W / 8];
        Doubles rest[W / 8];
        bool more = false;
        for (int h = 0; h < W / 8; h++) {
            Travel &l = travel[h];
            rest[h] = Travel::apart(l.nodes[0], l.v_dst);
            lands[h] = (Longs)(l.step > 0.99 * rest[h]);
            l.v_to = Travel::apart(l.nodes[0], l.step);
            l.to = l.moves ? (lands[h] ? l.t_dst : l.t_of(l.v_to)) : l.t;
            l.measure(H);
            for (int j = 0; j < H; j++) narrow(l.term(j, l.known - 1), h, &last[j]);
        }
        for (int c = 0; c < C; c++) {
            eta[c] = V{};
            for (int j = 0; j < H; j++) eta[c] += last[j] * d[j * C + c];
        }
        const V square = mean_square(eta);
        for (int h = 0; h < W / 8; h++) {
            Travel &l = travel[h];
            const Doubles foreseen = l.error(widen(square, h)), before = l.step;
            stop(h, l, foreseen, 3 * evaluations);
            const Longs several = (Longs)(l.known > 1), shorter = l.moves & several & (Longs)(foreseen > tol);
            done[h] = l.moves & lands[h] & several & ~shorter;
            if (any(shorter)) {
                const Doubles shrunk = smaller(l.step, rest[h]) * Travel::factor(tol, foreseen, l.known, 0.9);
                l.step = shorter ? shrunk : l.step;
            }
            l.step = smaller(l.step, rest[h] * (several ? all<Doubles>(0.9) : all<Doubles>(0.5)));
            l.moves &= ~done[h];
            if (evaluations >= job.most) stop(h, l, all<Doubles>(INFINITY), 3 * evaluations + 1);
            if (any(l.moves & (lands[h] | (Longs)(l.step != before)))) {
                l.v_to = Travel::apart(l.nodes[0], l.step);
                l.to = l.moves ? l.t_of(l.v_to) : l.to;
                l.measure(H);
            }
            more |= any(l.moves);
            narrow(l.keep, h, &keep);
            for (int j = 0; j < H; j++) narrow(l.known > all<Doubles>(j) ? l.moments[j] : Doubles{}, h, &moment[j]);
        }
        for (int c = 0; c < C; c++) {
            V sum = keep * base[c];
            for (int j = 0; j < H; j++) sum += moment[j] * d[j * C + c];
            x[c] = sum;
        }
        for (int h = 0; h < W / 8; h++) arrive(h, done[h], evaluations);
        return more;
    }

    // The evaluation there, and what the steps become by it.
    void correct(Travel *travel, int32_t evaluations) {
        const double tol = job.tol * job.tol;
        V across[MOST_KNOWN], last[MOST_KNOWN], *correction = eta, taken;
        Doubles times[W / 8];
        for (int h = 0; h < W / 8; h++) times[h] = travel[h].moves ? travel[h].to : travel[h].t;
        evaluate_at(times, travel, x, fresh);
        for (int h = 0; h < W / 8; h++) {
            const Travel &l = travel[h];
            for (int j = 0; j < H; j++) {
                const Doubles gap = l.v_to - l.nodes[j], wide = gap == 0 ? all<Doubles>(1) : gap;
                narrow(l.known > all<Doubles>(j) ? wide : all<Doubles>(INFINITY), h, &across[j]);
                narrow(l.term(j + 1, l.known), h, &last[j]);
            }
        }
        for (int j = 0; j < H; j++) across[j] = 1 / across[j];
        for (int c = 0; c < C; c++) {
            V newest = fresh[c], sum = {};
            for (int j = 0; j < H; j++) {
                newest = (newest - d[j * C + c]) * across[j];
                sum += last[j] * newest;
                fresh[(j + 1) * C + c] = newest;
            }
            correction[c] = sum;
        }
        const V square = mean_square(correction);
        for (int h = 0; h < W / 8; h++) {
            Travel &l = travel[h];
            const Doubles error = l.error(widen(square, h)) * (Travel::CORRECTION * Travel::CORRECTION);
            stop(h, l, error, 3 * evaluations + 2);
            const Longs good = l.moves & (Longs)(error <= tol);
            l.step *= Travel::factor(tol, error, l.known + 1, Travel::GROW);
            l.step = smaller(l.step, all<Doubles>(Travel::LONGEST));
            l.t = good ? l.to : l.t;
            for (int j = H; j-- > 1;) l.nodes[j] = good ? l.nodes[j - 1] : l.nodes[j];
            l.nodes[0] = good ? l.v_to : l.nodes[0];
            l.known = good ? smaller(l.known + 1, all<Doubles>(H)) : l.known;
            narrow(good ? all<Doubles>(1) : Doubles{}, h, &taken);
        }
        for (int c = 0; c < C; c++) base[c] = taken != 0 ? x[c] + correction[c] : base[c];
        for (int n = 0; n < H * C; n++) d[n] = taken != 0 ? fresh[n] : d[n];
    }

    void place(int64_t first, int64_t end) {
        lanes = end - first < W ? end - first : W;
        for (int i = 0; i < W; i++) index[i] = first + (i < lanes ? i : lanes - 1);
    }

    void run(std::atomic<int64_t> &next, Kind kind) {
        const int64_t per_time = job.times > 1 ? job.factors_per_time : job.factors;
        by_lane = job.times > 1 && per_time == 1;
        const int64_t span = by_lane ? job.factors : per_time, blocks = (span + W - 1) / W;
        const int64_t total = job.factors == 0 ? 0 : blocks * (job.factors / span);
        for (int64_t n; (n = next.fetch_add(1)) < total;) {
            const int64_t group = n / blocks, start = group * span + n % blocks * W;
            place(start, (group + 1) * span);
            time = by_lane ? start : job.times > 1 ? group : 0;
            if (kind == FORWARD) forward();
            else if (kind == BACKWARD) backward();
            else adaptive();
        }
    }
};

template <class V, bool OWN> static void work(const Job &job, std::atomic<int64_t> &next, Kind kind) {
    Block<V, OWN>(job, kind).run(next, kind);
}

template <class V> static void execute(const Job &job, Kind kind) {
    std::atomic<int64_t> next(0);
    auto one = [&] { job.own_variance ? work<V, true>(job, next, kind) : work<V, false>(job, next, kind); };
    if (job.threads == 1) return one();
#ifdef _OPENMP
    // PyTorch's own threads, where it runs on the same OpenMP: those spin for a while after its operations, and others
    // would have to share the cores with them.
#pragma omp parallel num_threads(job.threads)
    one();
#else
    std::vector<std::thread> others;
    for (int64_t n = 1; n < job.threads; n++) others.emplace_back(one);
    one();
    for (auto &other : others) other.join();
#endif
}

extern "C" void gm_float(const Job *job, int kind) { execute<Floats>(*job, (Kind)kind); }
extern "C" void gm_double(const Job *job, int kind) { execute<Doubles>(*job, (Kind)kind); }
