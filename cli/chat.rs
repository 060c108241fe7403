//! `baton chat`: a conversation in the terminal, or one question.

use std::io::{BufRead, IsTerminal, stdin, stdout};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;

use crate::api::{Api, Choice, Piece, Server};
use crate::print;

/// What is asked of whom.
#[derive(clap::Args)]
pub struct Args {
    /// One question; without it, a conversation
    question: Vec<String>,
    /// Model to ask for [default: the server's first]
    #[arg(long, value_name = "NAME")]
    model: Option<String>,
    /// What the model is told before the conversation
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// 0 always takes the likeliest token; more is more varied
    #[arg(long, value_name = "T")]
    temperature: Option<f32>,
    /// Longest answer
    #[arg(long, value_name = "TOKENS")]
    max_tokens: Option<u32>,
    #[command(flatten)]
    server: Server,
}

/// Talks until the question is answered, or `/exit`, end of input, or Ctrl-C at the prompt.
pub async fn run(args: Args) -> Result<()> {
    let api = args.server.api()?;
    let model = match args.model {
        Some(model) => model,
        None => api.model().await?,
    };
    let choice = Choice { temperature: args.temperature, max_tokens: args.max_tokens };
    let mut messages: Vec<Value> =
        args.system.iter().map(|text| json!({ "role": "system", "content": text })).collect();
    let mut interrupt = signal(SignalKind::interrupt())?;

    if !args.question.is_empty() {
        messages.push(json!({ "role": "user", "content": args.question.join(" ") }));
        return match answer(&api, &model, &messages, &choice, &mut interrupt).await? {
            Answered::Whole(_) => Ok(()),
            Answered::Interrupted(_) => bail!("interrupted"),
        };
    }

    let is_terminal = stdin().is_terminal();
    if is_terminal {
        print(&format!(
            "{model} at {}. /exit or Ctrl-D ends, Ctrl-C cuts an answer short.\n",
            args.server.url()
        ));
    }
    let mut lines = lines();
    loop {
        if is_terminal {
            print("> ");
        }
        let line = tokio::select! {
            line = lines.recv() => line,
            _ = interrupt.recv() => None,
        };
        let Some(line) = line else {
            if is_terminal {
                print("\n");
            }
            return Ok(());
        };
        match line.context("cannot read standard input")?.trim() {
            "" => continue,
            "/exit" | "/quit" => return Ok(()),
            text => messages.push(json!({ "role": "user", "content": text })),
        }
        match answer(&api, &model, &messages, &choice, &mut interrupt).await {
            Ok(Answered::Whole(text) | Answered::Interrupted(text)) => {
                messages.push(json!({ "role": "assistant", "content": text }));
            }
            // In a conversation a refusal is said, and the question is as if it had not been asked.
            Err(error) if is_terminal => {
                eprintln!("baton: {error:#}");
                messages.pop();
            }
            Err(error) => return Err(error),
        }
    }
}

enum Answered {
    Whole(String),
    Interrupted(String),
}

/// Prints an answer as it comes. Ctrl-C drops it, which cancels the request on the server.
async fn answer(
    api: &Api,
    model: &str,
    messages: &[Value],
    choice: &Choice,
    interrupt: &mut Signal,
) -> Result<Answered> {
    let mut page = Page { shows_thoughts: stdout().is_terminal(), ..Page::default() };
    let whole = async {
        let mut answer = api.chat(model, messages, choice).await?;
        while let Some(piece) = answer.next().await? {
            print(&page.add(&piece));
        }
        Ok(answer.is_cut())
    };
    let ended: Result<Option<bool>> = tokio::select! {
        result = whole => result.map(Some),
        _ = interrupt.recv() => Ok(None),
    };
    print(page.end());
    let text = page.text;
    match ended? {
        None => Ok(Answered::Interrupted(text)),
        Some(is_cut) => {
            // Who set a limit knows it; that nothing but thoughts came is worth a word.
            if is_cut && (choice.max_tokens.is_none() || text.is_empty()) {
                eprintln!("baton: the answer ends here for lack of room");
            }
            Ok(Answered::Whole(text))
        }
    }
}

/// What an answer looks like: thoughts, at a terminal only, faint and above it.
#[derive(Debug, Default)]
struct Page {
    shows_thoughts: bool,
    /// Of the answer.
    text: String,
    in_thought: bool,
}

impl Page {
    /// What is written for a piece.
    fn add(&mut self, piece: &Piece) -> String {
        match piece {
            Piece::Thought(_) if !self.shows_thoughts => String::new(),
            Piece::Thought(thought) if self.in_thought => thought.clone(),
            Piece::Thought(thought) => {
                self.in_thought = true;
                format!("\x1b[2m{thought}")
            }
            Piece::Text(text) => {
                self.text.push_str(text);
                let end = if std::mem::take(&mut self.in_thought) { "\x1b[0m\n\n" } else { "" };
                format!("{end}{text}")
            }
        }
    }

    /// What is written at the end, however it came.
    fn end(&mut self) -> &'static str {
        match (std::mem::take(&mut self.in_thought), self.text.is_empty() || self.text.ends_with('\n')) {
            (true, _) => "\x1b[0m\n",
            (false, true) => "",
            (false, false) => "\n",
        }
    }
}

/// Lines of standard input, read by a thread of their own: such a read cannot be cut short.
fn lines() -> mpsc::Receiver<std::io::Result<String>> {
    let (lines, inbox) = mpsc::channel(1);
    std::thread::spawn(move || {
        for line in stdin().lock().lines() {
            if lines.blocking_send(line).is_err() {
                break;
            }
        }
    });
    inbox
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(shows_thoughts: bool, pieces: &[Piece]) -> (String, String) {
        let mut page = Page { shows_thoughts, ..Page::default() };
        let mut text: String = pieces.iter().map(|piece| page.add(piece)).collect();
        text.push_str(page.end());
        (text, page.text)
    }

    /// Thoughts are seen while they come, and are no part of the answer; a pipe gets the answer alone.
    #[test]
    fn thoughts_are_faint_and_above_the_answer() {
        let thought = |text: &str| Piece::Thought(text.into());
        let text = |text: &str| Piece::Text(text.into());
        let whole = [thought("Hm"), thought("."), text("Yes"), text("!")];
        assert_eq!(shown(true, &whole), ("\x1b[2mHm.\x1b[0m\n\nYes!\n".into(), "Yes!".into()));
        assert_eq!(shown(false, &whole), ("Yes!\n".into(), "Yes!".into()));
        assert_eq!(shown(true, &whole[..1]).0, "\x1b[2mHm\x1b[0m\n", "cut short: nothing stays faint");
        assert_eq!(shown(true, &[text("a\n")]).0, "a\n");
    }
}
