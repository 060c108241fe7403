//! A follower's loop: what the leader says is done, in order.

use std::collections::VecDeque;
use std::sync::mpsc::RecvTimeoutError;
use std::time::Duration;

use backend::Backend;

use crate::error::EngineError;
use crate::executor::{Executor, Submitted};
use crate::handle::{Command, Commands};
use crate::tp::plan::{Notice, Plan};
use crate::tp::{Frame, TpError};

/// A follower with a step under way to which no plan comes for so long looks how that step ended.
const PLAN_WAIT: Duration = Duration::from_millis(50);

/// Until the engine is stopped here, or the group ends.
pub(super) fn follow<B: Backend>(
    executor: &mut Executor<'_, B>,
    epoch: u64,
    rank: usize,
    commands: &Commands,
) -> Result<(), EngineError> {
    let lost = |reason| EngineError::Group(TpError::Lost { rank: 0, reason });
    let mut steps = 0;
    let mut running = VecDeque::new();
    loop {
        if commands.stopping() {
            return Ok(());
        }
        let command = match running.is_empty() {
            true => commands.receiver.recv().map_err(RecvTimeoutError::from),
            false => commands.receiver.recv_timeout(PLAN_WAIT),
        };
        let command = match command {
            Ok(command) => command,
            Err(RecvTimeoutError::Timeout) => {
                running.pop_front().map(Submitted::wait).transpose()?;
                continue;
            }
            Err(RecvTimeoutError::Disconnected) => return Ok(()),
        };
        let frame = match command {
            Command::Frame { epoch: of, frame, .. } if of == epoch => frame,
            other => {
                commands.refuse(other, &format!("rank {rank} follows"));
                continue;
            }
        };
        match frame {
            Ok(Frame::Plan(bytes)) => {
                let plan = Plan::decode(&bytes).map_err(TpError::from)?;
                steps += 1;
                if plan.step != steps {
                    return Err(EngineError::Plan(format!("step {} came as number {steps}", plan.step)));
                }
                running.push_back(executor.execute(&plan)?);
                (executor.notify)(Notice::Executed { step: plan.step });
                while running.len() > 1 || running.front().is_some_and(Submitted::ready) {
                    running.pop_front().map(Submitted::wait).transpose()?;
                }
            }
            Ok(Frame::End(reason)) => return Err(lost(format!("ended the group: {reason}"))),
            Ok(other) => return Err(lost(format!("sent {other:?}"))),
            Err(error) => return Err(lost(error.to_string())),
        }
    }
}
