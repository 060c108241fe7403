//! Decides which rows run in the next step: every generating sequence its one, then prompts in chunks as far as the
//! token budget goes, so that a long prompt never stalls a running stream. Pure: no I/O, no clock. Called by the runner.

/// Rows of a step whose logits go to the host because a prompt's tokens are scored: 64 rows of 152k ids are 39 MB.
const SCORED_ROWS_MAX: usize = 64;

/// Bounds of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Rows of a step; greater than the number of sequences that may generate at once.
    pub step_tokens: usize,
    /// Rows of one prompt in a step.
    pub chunk_tokens: usize,
}

/// What a sequence could compute next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Want {
    /// The sequence's job.
    pub job: u64,
    /// Lower runs later.
    pub priority: i32,
    /// Rows not computed yet, at least 1.
    pub rows: usize,
    /// It generates: its one row goes first.
    pub generating: bool,
    /// Its rows are scored: their logits go to the host.
    pub scored: bool,
}

/// Rows that a sequence gets in the next step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share {
    /// The sequence's job.
    pub job: u64,
    /// Its next rows, at least 1.
    pub rows: usize,
}

/// Shares of the next step, generating sequences first. Jobs are numbered in order of arrival.
pub fn next(limits: Limits, wants: &[Want]) -> Vec<Share> {
    let mut shares: Vec<Share> =
        wants.iter().filter(|w| w.generating).map(|w| Share { job: w.job, rows: 1 }).collect();
    let mut budget = limits.step_tokens.saturating_sub(shares.len());
    let mut prompts: Vec<&Want> = wants.iter().filter(|w| !w.generating).collect();
    prompts.sort_by_key(|w| (std::cmp::Reverse(w.priority), w.job));
    let mut scored = SCORED_ROWS_MAX;
    for want in prompts {
        let mut rows = want.rows.min(limits.chunk_tokens).min(budget);
        if rows == 0 {
            break;
        }
        if want.scored {
            rows = rows.min(scored);
            scored -= rows;
            if rows == 0 {
                continue;
            }
        }
        budget -= rows;
        shares.push(Share { job: want.job, rows });
    }
    shares
}

/// Rows of a step that no running sequence wants: what a waiting prompt may begin with. 0: let it wait.
pub fn spare(limits: Limits, wants: &[Want]) -> usize {
    limits.step_tokens - next(limits, wants).iter().map(|s| s.rows).sum::<usize>().min(limits.step_tokens)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const LIMITS: Limits = Limits { step_tokens: 64, chunk_tokens: 24 };

    fn prompt(job: u64, priority: i32, rows: usize) -> Want {
        Want { job, priority, rows, generating: false, scored: false }
    }

    fn generating(job: u64) -> Want {
        Want { job, priority: 0, rows: 1, generating: true, scored: false }
    }

    #[test]
    fn a_long_prompt_takes_what_streams_leave() {
        let wants = [prompt(1, 0, 5000), generating(2), generating(3)];
        let shares = next(Limits { step_tokens: 10, chunk_tokens: 24 }, &wants);
        assert_eq!(shares, [Share { job: 2, rows: 1 }, Share { job: 3, rows: 1 }, Share { job: 1, rows: 8 }]);
    }

    #[test]
    fn prompts_go_by_priority_then_arrival() {
        let wants = [prompt(1, -1, 100), prompt(3, 0, 100), prompt(2, 0, 5)];
        let order: Vec<(u64, usize)> = next(LIMITS, &wants).iter().map(|s| (s.job, s.rows)).collect();
        assert_eq!(order, [(2, 5), (3, 24), (1, 24)]);
    }

    #[test]
    fn scored_rows_are_few_and_hold_no_other_prompt_up() {
        let limits = Limits { step_tokens: 1000, chunk_tokens: 500 };
        let scored = |job, rows| Want { scored: true, ..prompt(job, 0, rows) };
        let shares = next(limits, &[scored(1, 40), scored(2, 400), scored(3, 5), prompt(4, 0, 700)]);
        let rows: Vec<(u64, usize)> = shares.iter().map(|s| (s.job, s.rows)).collect();
        assert_eq!(rows, [(1, 40), (2, SCORED_ROWS_MAX - 40), (4, 500)]);
    }

    #[test]
    fn spare_rows_are_those_left_over() {
        assert_eq!(spare(LIMITS, &[]), 64);
        assert_eq!(spare(LIMITS, &[prompt(1, 0, 10), generating(2)]), 53);
        assert_eq!(spare(LIMITS, &[prompt(1, 0, 99), prompt(2, 0, 99), prompt(3, 0, 99)]), 0);
    }

    fn wants() -> impl Strategy<Value = Vec<Want>> {
        prop::collection::vec((-2i32..3, 1usize..300, any::<bool>()), 0..40).prop_map(|all| {
            (0..)
                .zip(all)
                .map(|(job, (priority, rows, generating))| Want {
                    job,
                    priority,
                    rows: if generating { 1 } else { rows },
                    generating,
                    scored: false,
                })
                .collect()
        })
    }

    proptest! {
        #[test]
        fn streams_always_run_and_the_budget_holds(wants in wants()) {
            let shares = next(LIMITS, &wants);
            let rows: usize = shares.iter().map(|s| s.rows).sum();
            prop_assert!(rows <= LIMITS.step_tokens);
            for want in wants.iter().filter(|w| w.generating) {
                prop_assert_eq!(shares.iter().filter(|s| s.job == want.job).count(), 1);
            }
            for share in &shares {
                let want = wants.iter().find(|w| w.job == share.job).expect("a share of a known job");
                prop_assert!(share.rows >= 1 && share.rows <= want.rows && share.rows <= LIMITS.chunk_tokens);
            }
        }

        // No prompt runs while one of higher priority, or an earlier one of the same, gets less than its chunk.
        #[test]
        fn prompts_are_served_in_order(wants in wants()) {
            let shares = next(LIMITS, &wants);
            let given = |job| shares.iter().find(|s| s.job == job).map_or(0, |s| s.rows);
            for early in wants.iter().filter(|w| !w.generating) {
                for late in wants.iter().filter(|w| !w.generating) {
                    let before = (late.priority, early.job) < (early.priority, late.job);
                    if before && given(late.job) > 0 {
                        prop_assert_eq!(given(early.job), early.rows.min(LIMITS.chunk_tokens));
                    }
                }
            }
        }
    }
}
