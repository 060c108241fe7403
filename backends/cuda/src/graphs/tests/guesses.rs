//! Steps with guesses are replayed, too, however many there are: each is a row like any other. What holds of them is what would
//! have come token by token.

use super::group::{alone, drawn, generate, open_ends, rank_of, ranks};
use super::*;

const SEQUENCES: usize = 2;
const TOKENS: usize = 28;

/// In step `at`: guesses that hold, and those behind them that do not.
fn guesses(at: usize, seq: usize) -> (usize, usize) {
    [(1, 0), (0, 1), (0, 0), (4, 4), (0, 0), (1, 1), (0, 2)][(at + 2 * seq) % 7]
}

/// By this rule, where the host does not draw.
fn draw(rule: Rule, position: usize) -> Draw {
    match position % 5 {
        3 => Draw::Logits,
        _ => Draw::Token(Rule { position: position as u64, ..rule }),
    }
}

/// The id that a row draws, and what the host saw of it.
fn id(row: &Drawn, rule: Rule, position: usize) -> u32 {
    let of_logits;
    let row = match row {
        Drawn::Logits(logits) => {
            of_logits =
                backend::draw::drawn(logits, &Draw::Token(Rule { position: position as u64, ..rule }));
            &of_logits
        }
        row => row,
    };
    let Drawn::Token(id) = row else { panic!("{row:?} at {position}") };
    *id
}

/// What each sequence says, token by token, without graphs.
fn answers(rule: Rule) -> Vec<Vec<u32>> {
    let mut toy = Toy::new(Emulated::open(0, None).unwrap(), DType::BF16).unwrap();
    toy.device.replay_steps(false);
    let prompts = toy.prompts(SEQUENCES, 80);
    let mut batch = prompts.clone();
    let mut answers = vec![Vec::new(); SEQUENCES];
    for at in 0..TOKENS {
        let draws = vec![draw(rule, at); SEQUENCES];
        let rows = ids(toy.step(&batch, None, |x| Out::Draw(x, draws)).0.wait());
        batch = Batch::default();
        for (seq, run) in prompts.runs.iter().enumerate() {
            answers[seq].push(id(&rows[seq], rule, at));
            batch.push(run.seq, run.len + at as u32, &answers[seq][at..]);
        }
    }
    answers
}

/// The same with guesses: what all rows drew, those of wrong guesses, too.
fn guessed(toy: &mut Toy, answers: &[Vec<u32>], rule: Rule) -> Vec<Vec<Drawn>> {
    let prompts = toy.prompts(SEQUENCES, 80);
    let draws = vec![draw(rule, 0); SEQUENCES];
    let first = toy.step(&prompts, None, |x| Out::Draw(x, draws)).0;
    let mut told = vec![drawn(toy, first)];
    // Tokens of each that are known.
    let mut known = [1; SEQUENCES];
    for at in 0.. {
        let (mut batch, mut draws, mut wanted) = (Batch::default(), Vec::new(), Vec::new());
        for (seq, run) in prompts.runs.iter().enumerate() {
            let (held, wrong) = guesses(at, seq);
            let Some(want) = answers[seq].get(known[seq]..=known[seq] + held) else { continue };
            let mut text = answers[seq][known[seq] - 1..known[seq] + held].to_vec();
            let last = want[held];
            text.extend((1..).map(|i| (last + i) % VOCABULARY as u32).take(wrong));
            batch.push(run.seq, run.len + known[seq] as u32 - 1, &text);
            wanted.extend((0..).zip(want).map(|(row, id)| (draws.len() + row, *id, known[seq] + row)));
            draws.extend((known[seq]..).map(|position| draw(rule, position)).take(text.len()));
            known[seq] += held + 1;
        }
        if draws.is_empty() {
            break;
        }
        let rows: Vec<u32> = (0..draws.len() as u32).collect();
        let pending = toy.step_of(&batch, &rows, None, |x| Out::Draw(x, draws)).0;
        let rows = drawn(toy, pending);
        for (row, want, position) in wanted.into_iter().filter(|_| !rows.is_empty()) {
            assert_eq!(id(&rows[row], rule, position), want, "step {at}, position {position}");
        }
        told.push(rows);
    }
    told
}

/// Greedy on a device of its own memory, by noise on one with its host's and a library of products: what guesses bring is what
/// would have come without, and bit by bit the same with graphs; wrong ones leave nothing behind.
#[test]
fn guesses_are_replayed_and_change_nothing() {
    for (device, rule) in [(0, Rule::GREEDY), (3, Rule { temperature: 0.9, seed: 5, ..Rule::GREEDY })] {
        let answers = answers(rule);
        let told = [false, true].map(|replays| {
            let mut toy = Toy::new(Emulated::open(device, None).unwrap(), DType::BF16).unwrap();
            toy.device.replay_steps(replays);
            let told = guessed(&mut toy, &answers, rule);
            // Every number of rows comes by turns: the first time it is queued, and from then on a graph.
            let (steps, replayed) = (told.len() as u64, toy.device.replayed_steps());
            assert_eq!(replayed > steps / 2, replays, "{replayed} of {steps} steps were replayed");
            told
        });
        assert!(told[0] == told[1], "device {device}");
    }
}

/// Two ranks replay the same steps, and what they say is what comes token by token.
#[test]
fn a_group_replays_guesses() {
    let _alone = alone();
    let plain = ranks(2, |_, group| generate(&mut rank_of(group, 0), TOKENS as u32, |_, _| {}));
    let said = |seq: usize| plain[0].iter().map(|rows| id(&rows[seq], Rule::GREEDY, 0)).collect();
    let answers: Vec<Vec<u32>> = (0..SEQUENCES).map(said).collect();
    let run = |replays: bool| {
        ranks(2, |_, group| {
            let mut toy = rank_of(group, 0);
            toy.device.replay_steps(replays);
            let told = guessed(&mut toy, &answers, Rule::GREEDY);
            (told, toy.device.replayed_steps())
        })
    };
    let (queued, replayed) = (run(false), run(true));
    assert!(queued[0].0 == replayed[0].0);
    let steps = replayed[0].0.len() as u64;
    assert!(replayed[0].1 > steps / 2, "{} of {steps} steps were replayed", replayed[0].1);
    assert_eq!((replayed[0].1, queued[0].1), (replayed[1].1, 0));
    assert_eq!(open_ends(), 0);
}
