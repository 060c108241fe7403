//! How near two runs are, in the measures of the golden cases: error in standard deviations of a row, and KL divergence.

/// What must hold.
pub struct Limits {
    /// Largest error, in standard deviations of the row.
    pub error_max: f64,
    /// Median over rows of the KL divergence, in nats.
    pub kl_median: f64,
    /// Largest KL divergence.
    pub kl_max: f64,
    /// The most likely id must agree where it leads by more than this, in standard deviations.
    pub margin: f64,
}

impl Limits {
    /// An engine that computes in f32 throughout.
    pub fn f32() -> Limits {
        Limits { error_max: 2e-4, kl_median: 1e-9, kl_max: 1e-8, margin: 1e-3 }
    }

    /// Activations in bf16, sums in f32; `reference` is the median divergence of the reference's own bf16 run.
    pub fn bf16(reference: f64) -> Limits {
        let free = f64::INFINITY;
        Limits { error_max: free, kl_median: 3.0 * reference.max(3e-4), kl_max: free, margin: 0.25 }
    }

    /// Activations in 8 bits where weights are quantised.
    pub fn loose(reference: f64) -> Limits {
        let free = f64::INFINITY;
        Limits { error_max: free, kl_median: 10.0 * reference.max(3e-4), kl_max: free, margin: 0.5 }
    }
}

/// Panics with the measures of every row when `got` is not within `limits` of `want`, both `[rows, width]`.
pub fn check(what: &str, want: &[f32], got: &[f32], width: usize, limits: &Limits) {
    assert_eq!(want.len(), got.len(), "{what}: number of logits");
    assert!(got.iter().all(|logit| logit.is_finite()), "{what}: not finite");
    let mut kls = Vec::new();
    for (row, (want, got)) in want.chunks(width).zip(got.chunks(width)).enumerate() {
        let error = f32_error(want, got);
        assert!(error <= limits.error_max, "{what} row {row}: off by {error} deviations");
        let kl = divergence(want, got);
        assert!(kl <= limits.kl_max, "{what} row {row}: KL {kl}");
        kls.push(kl);
        let best = best(want);
        let second = (0..width).filter(|id| *id != best).map(|id| want[id]).fold(f32::MIN, f32::max);
        let lead = f64::from(want[best] - second) / deviation(want);
        assert!(
            self::best(got) == best || lead <= limits.margin,
            "{what} row {row}: another first id, lead {lead}"
        );
    }
    kls.sort_by(f64::total_cmp);
    let median = kls[(kls.len() - 1) / 2];
    assert!(median <= limits.kl_median, "{what}: median KL {median}, limit {}", limits.kl_median);
}

/// Largest error in standard deviations of `want`.
pub fn f32_error(want: &[f32], got: &[f32]) -> f64 {
    assert_eq!(want.len(), got.len());
    let error = want.iter().zip(got).map(|(want, got)| f64::from((want - got).abs())).fold(0.0, f64::max);
    error / deviation(want)
}

pub fn deviation(row: &[f32]) -> f64 {
    let mean = row.iter().map(|x| f64::from(*x)).sum::<f64>() / row.len() as f64;
    let squares = row.iter().map(|x| (f64::from(*x) - mean).powi(2)).sum::<f64>();
    (squares / (row.len() - 1) as f64).sqrt()
}

fn best(row: &[f32]) -> usize {
    (0..row.len()).max_by(|a, b| row[*a].total_cmp(&row[*b])).unwrap()
}

/// KL(want || got) in nats.
fn divergence(want: &[f32], got: &[f32]) -> f64 {
    let (a, b) = (log_softmax(want), log_softmax(got));
    a.iter().zip(&b).map(|(a, b)| a.exp() * (a - b)).sum()
}

fn log_softmax(row: &[f32]) -> Vec<f64> {
    let max = row.iter().copied().fold(f32::MIN, f32::max);
    let sum: f64 = row.iter().map(|x| f64::from(x - max).exp()).sum();
    row.iter().map(|x| f64::from(x - max) - sum.ln()).collect()
}
