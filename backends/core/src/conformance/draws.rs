//! Cases of tokens that the device draws: by which rule, and how the next step uses them before the host knows them.

use super::exact::ranks;
use super::{Case, Rig, Suite, Tensor, rows_batch};
use crate::draw::{Draw, Drawn, Noise, Rule, draw};
use crate::{Backend, BackendError, Batch, DType, KvSpec, Out, Output, Pending, SeqId, Step};

/// How far two scores, or a logit and a filter's edge, may be apart for a device to take one for the other.
const SCORE_TOLERANCE: f64 = 1e-3;

pub(super) fn cases<'a, B: Backend>() -> Vec<Case<'a, B>> {
    vec![
        ("draws by rule", by_rule),
        ("draws beside logits", beside_logits),
        ("tokens in flight", in_flight),
        ("tokens in flight in a group", in_a_group),
    ]
}

/// Submits a step whose logits are the rows of `table` at the batch's ids.
fn submit<B: Backend>(
    rig: &mut Rig<B>,
    batch: &Batch,
    table: &B::Weight,
    draws: Option<Vec<Draw>>,
) -> Box<dyn Pending<B::Hidden>> {
    let mut step = rig.backend.step(&mut rig.kv, batch);
    let x = step.embed(table);
    step.submit(match draws {
        Some(draws) => Out::Draw(x, draws),
        None => Out::Logits(x),
    })
}

fn drawn<H>(output: Result<Output<H>, BackendError>) -> Vec<Drawn> {
    match output {
        Ok(Output::Drawn(rows)) => rows,
        Ok(_) => panic!("the step drew nothing"),
        Err(error) => panic!("step: {error}"),
    }
}

fn logits<H>(output: Result<Output<H>, BackendError>) -> Vec<f32> {
    match output {
        Ok(Output::Logits(logits)) => logits,
        Ok(_) => panic!("the step gave no logits"),
        Err(error) => panic!("step: {error}"),
    }
}

/// Every rule, on the logits as the device has them.
fn by_rule<B: Backend>(suite: &Suite<'_, B>, dtype: DType) {
    const VOCABULARY: usize = 700;
    let plain = Rule { temperature: 0.8, ..Rule::GREEDY };
    let kinds = [
        Rule { top_k: 3, top_p: 0.5, ..Rule::GREEDY },
        plain,
        Rule { temperature: 2.5, ..plain },
        Rule { top_k: 1, ..plain },
        Rule { top_k: 20, ..plain },
        Rule { top_k: 100_000, ..plain },
        Rule { top_p: 0.9, ..plain },
        Rule { top_p: 1e-6, ..plain },
        Rule { min_p: 0.05, ..plain },
        Rule { top_k: 40, top_p: 0.95, min_p: 0.01, temperature: 1.4, ..plain },
    ];
    let rules: Vec<Rule> = (0..6)
        .flat_map(|i| kinds.map(|kind| Rule { seed: u64::MAX / (i + 1), position: 100 + 7 * i, ..kind }))
        .collect();
    let mut rig = suite.rig(dtype);
    let x = Tensor::random(1, dtype, rules.len(), VOCABULARY, 3.0);
    let table = rig.embedding(&x);
    // Alike all at once and with other rules for company: filters may take another way then.
    for part in [&rules[..], &rules[..3], &rules[1..2], &rules[6..7]] {
        let batch = rows_batch(part.len());
        let rows = logits(submit(&mut rig, &batch, &table, None).wait());
        let draws = part.iter().copied().map(Draw::Token).collect();
        let got = drawn(submit(&mut rig, &batch, &table, Some(draws)).wait());
        assert_eq!(got.len(), part.len());
        for ((row, rule), got) in rows.chunks(VOCABULARY).zip(part).zip(got) {
            let Drawn::Token(id) = got else { panic!("{rule:?} gave {got:?}") };
            if rig.backend.caps().exact {
                assert_eq!(Some(id), draw(row, rule), "{rule:?}");
            }
            judge(row, rule, id);
        }
    }
}

/// Asserts that `id` is what `rule` draws from `row`, or so near to it that rounding may tell them apart.
fn judge(row: &[f32], rule: &Rule, id: u32) {
    let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    if rule.is_greedy() {
        assert_eq!(row.iter().position(|x| *x == max), Some(id as usize), "{rule:?}");
        return;
    }
    let z: Vec<f64> = row.iter().map(|x| f64::from(x - max) / f64::from(rule.temperature)).collect();
    let mut sorted = z.clone();
    sorted.sort_by(|a, b| b.total_cmp(a));
    // The least value that each filter keeps, one after the other.
    let mut edge = f64::from(rule.min_p).ln();
    if rule.top_k > 0 {
        edge = edge.max(sorted[(rule.top_k as usize).min(sorted.len()) - 1]);
    }
    if rule.top_p < 1.0 {
        let kept: Vec<f64> = sorted.iter().copied().filter(|z| *z >= edge).collect();
        let target = f64::from(rule.top_p) * kept.iter().map(|z| z.exp()).sum::<f64>();
        let mut sum = 0.0;
        let last = kept.iter().find(|z| {
            sum += z.exp();
            sum >= target
        });
        edge = edge.max(last.copied().unwrap_or(edge));
    }
    let noise = Noise::new(rule.seed, rule.position);
    let score = |id: usize| z[id] + Noise::gumbel(noise.bits(id as u32));
    let surely = (0..z.len()).filter(|id| z[*id] >= edge + SCORE_TOLERANCE || z[*id] == 0.0);
    let best = surely.map(score).fold(f64::NEG_INFINITY, f64::max);
    let id = id as usize;
    assert!(z[id] >= edge - SCORE_TOLERANCE, "{rule:?}: id {id} at {} is kept, the edge is {edge}", z[id]);
    assert!(score(id) >= best - SCORE_TOLERANCE, "{rule:?}: id {id} scores {}, another {best}", score(id));
}

/// Rows of one step may go either way, and a row that is no number spoils no other.
fn beside_logits<B: Backend>(suite: &Suite<'_, B>, dtype: DType) {
    let mut rig = suite.rig(dtype);
    let mut values = Tensor::random(1, dtype, 5, 33, 1.0).values;
    (values[2 * 33 + 7], values[4 * 33 + 9]) = (f64::NAN, f64::INFINITY);
    (values[33 + 32], values[33 + 5]) = (9.0, 9.0);
    let x = Tensor::new(dtype, 5, 33, values.into_iter());
    let table = rig.embedding(&x);
    let batch = rows_batch(5);
    let warm = Draw::Token(Rule { temperature: 1.0, top_k: 5, ..Rule::GREEDY });
    let draws = vec![Draw::Logits, Draw::Token(Rule::GREEDY), Draw::Token(Rule::GREEDY), Draw::Logits, warm];
    let got = drawn(submit(&mut rig, &batch, &table, Some(draws)).wait());
    assert_eq!(got[1], Drawn::Token(5), "the lowest of the greatest");
    assert_eq!((&got[2], &got[4]), (&Drawn::NotFinite { id: 7 }, &Drawn::NotFinite { id: 9 }));
    for row in [0, 3] {
        let Drawn::Logits(logits) = &got[row] else { panic!("row {row} gave {:?}", got[row]) };
        suite.close(dtype, &format!("logits of row {row}"), logits, x.row(row));
    }
    let draws = vec![Draw::Logits; 5];
    let all = drawn(submit(&mut rig, &batch, &table, Some(draws)).wait());
    assert!(all.iter().all(|row| matches!(row, Drawn::Logits(logits) if logits.len() == 33)));
    let refused = submit(&mut rig, &batch, &table, Some(vec![Draw::Logits])).wait();
    assert!(refused.is_err(), "one draw for five rows was accepted");
}

/// A step uses what the one before draws, three of them submitted one after the other before the first result is asked for.
fn in_flight<B: Backend>(suite: &Suite<'_, B>, dtype: DType) {
    let mut rig = suite.rig(dtype);
    let x = Tensor::random(1, dtype, 40, 40, 3.0);
    let table = rig.embedding(&x);
    let warm = |position| Draw::Token(Rule { temperature: 1.5, position, ..Rule::GREEDY });
    let draws = |position| Some(vec![warm(position), Draw::Token(Rule::GREEDY), warm(position + 1)]);
    let first = rows_batch(3);
    let mut second = Batch::default();
    second.push_drawn(SeqId(5), 0, 2);
    second.push(SeqId(6), 0, &[9]);
    second.push_drawn(SeqId(7), 0, 0);
    let mut third = Batch::default();
    (0..3).for_each(|row| third.push_drawn(SeqId(u64::from(row)), 0, row));
    let pending = submit(&mut rig, &first, &table, draws(0));
    let next = submit(&mut rig, &second, &table, draws(3));
    let last = submit(&mut rig, &third, &table, None);
    let ids = |rows: Vec<Drawn>| -> Vec<usize> {
        let id = |row| if let Drawn::Token(id) = row { id as usize } else { panic!("{row:?}") };
        rows.into_iter().map(id).collect()
    };
    let first = ids(drawn(pending.wait()));
    let second = ids(drawn(next.wait()));
    let last = logits(last.wait());
    // The same with ids that the host knows.
    let mut known = Batch::default();
    let inputs = [first[2], 9, first[0]].map(|id| id as u32);
    inputs.iter().zip(0..).for_each(|(id, seq)| known.push(SeqId(seq), 0, &[*id]));
    assert_eq!(second, ids(drawn(submit(&mut rig, &known, &table, draws(3)).wait())));
    let want: Vec<f64> = second.iter().flat_map(|id| x.row(*id).to_vec()).collect();
    suite.close(dtype, "rows of drawn ids", &last, &want);
    // What the step before did not draw cannot be used: it had no such row, gave the logits, or drew nothing at all.
    let refused = |rig: &mut Rig<B>, draws: Option<Vec<Draw>>, row: u32| {
        let before = submit(rig, &rows_batch(2), &table, draws);
        let mut batch = Batch::default();
        batch.push_drawn(SeqId(1), 0, row);
        let refused = submit(rig, &batch, &table, None).wait().is_err();
        assert!(before.wait().is_ok());
        refused
    };
    let draws = || Some(vec![Draw::Token(Rule::GREEDY), Draw::Logits]);
    assert!(!refused(&mut rig, draws(), 0), "a token in flight was refused");
    assert!(refused(&mut rig, draws(), 1), "logits were taken for a token");
    assert!(refused(&mut rig, draws(), 2), "row 2 of two was taken");
    assert!(refused(&mut rig, None, 0), "a step that draws nothing gave a token");
}

/// Every rank computes with the ids that rank 0 drew.
fn in_a_group<B: Backend>(suite: &Suite<'_, B>, dtype: DType) {
    let Some(group) = suite.group else { return };
    let (world, width) = (3, 8);
    let x = Tensor::random(1, dtype, world * width, world * width, 3.0);
    let all = ranks(group, world, |rank, group| {
        let mut rig = suite.rig_with(&suite.options(dtype), group, &KvSpec::gqa(1, 1, 0..1, 8, dtype), 64);
        // This rank's part of the vocabulary's logits.
        let columns = (0..x.rows).flat_map(|row| x.row(row)[rank * width..(rank + 1) * width].to_vec());
        let columns = Tensor::new(dtype, x.rows, width, columns);
        let table = rig.embedding(&columns);
        let warm = Draw::Token(Rule { temperature: 1.0, seed: 3, ..Rule::GREEDY });
        let draws = vec![Draw::Token(Rule::GREEDY), warm, Draw::Logits];
        let pending = submit(&mut rig, &rows_batch(3), &table, Some(draws));
        let mut batch = Batch::default();
        batch.push_drawn(SeqId(0), 0, 1);
        batch.push_drawn(SeqId(1), 0, 0);
        let last = submit(&mut rig, &batch, &table, None);
        let rows = pending.wait().unwrap_or_else(|error| panic!("rank {rank}: {error}"));
        let last = last.wait().unwrap_or_else(|error| panic!("rank {rank}: {error}"));
        (rank == 0).then(|| (drawn(Ok(rows)), logits(Ok(last))))
    });
    // Where ranks are processes of their own, rank 0 may be another one.
    let Some((_, Some((rows, last)))) = all.first() else { return };
    let (Drawn::Token(greedy), Drawn::Token(warm)) = (&rows[0], &rows[1]) else { panic!("{rows:?}") };
    // Every rank shows its own part of the rows that it took.
    let want = [x.row(*warm as usize), x.row(*greedy as usize)].concat();
    suite.close(dtype, "rows of drawn ids", last, &want);
}
